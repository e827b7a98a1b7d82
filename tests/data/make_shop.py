"""Writes tests/data/shop: products.csv and clicks.csv of an invented shop, with the defects that such files have.

`python tests/data/make_shop.py` writes the same bytes every time. Shoppers search with other words than the titles have
("couch" for a sofa), so that a rewritten query can find more than the raw one. The defects:

- products.csv: byte order mark, CRLF, HTML and entities (some escaped twice), identical rows, different rows of one id,
  missing titles, empty descriptions, one row with neither, titles in other scripts.
- clicks.csv: byte order mark, ids that pandas has made floats (1014.0), discontinued products, blank searches, repeated
  rows, and days in four formats.
"""

from __future__ import annotations

import csv
import datetime
import io
import random
from pathlib import Path

SHOP = Path(__file__).parent / "shop"
# What the shop calls its goods, what it says of them, and what shoppers type.
KINDS = [
    ("Sofa", "upholstered seating with two cushions", ["couch", "settee for the living room", "loveseat"]),
    ("Tumbler", "borosilicate, dishwasher safe", ["drinking glass", "water glasses", "glass for juice"]),
    ("Duvet", "box-stitched, for all seasons", ["blanket for bed", "comforter", "warm bedding"]),
    ("Luminaire", "dimmable, with a fabric cord", ["lamp", "ceiling light", "lighting for the kitchen"]),
    ("Rucksack", "padded straps, rain cover", ["backpack", "school bag", "bag for hiking"]),
    ("Trainers", "breathable upper, cushioned sole", ["running shoes", "sneakers", "gym shoes"]),
    ("Secateurs", "bypass blade, safety catch", ["pruning shears", "garden scissors", "rose cutter"]),
    ("Perambulator", "folds flat, lockable wheels", ["stroller", "baby buggy", "pram for newborn"]),
    ("Casserole", "enamelled, for all hobs", ["cooking pot", "stew pan", "pot with lid"]),
    ("Timepiece", "sapphire crystal, quartz movement", ["watch", "wristwatch for men", "clock for the wrist"]),
    ("Pullover", "ribbed cuffs, crew neck", ["sweater", "jumper", "warm knit top"]),
    ("Escritoire", "two drawers, cable outlet", ["desk", "writing table", "table for home office"]),
    ("Humidifier", "ultrasonic, runs twelve hours", ["dry air", "mist maker", "air moisture machine"]),
    ("Whetstone", "two grits, with a base", ["knife sharpener", "sharpen knives", "blade sharpening"]),
    ("Parasol", "tilting head, UV 50+", ["sun shade", "beach umbrella", "umbrella for patio"]),
    ("Headset", "closed back, detachable microphone", ["earphones", "gaming headphones", "phones for calls"]),
    ("Valise", "four wheels, TSA lock", ["suitcase", "luggage", "cabin bag"]),
    ("Notebook", "dotted pages, lies flat", ["journal", "writing pad", "diary"]),
    ("Colander", "fine holes, stable feet", ["pasta strainer", "sieve", "drain vegetables"]),
    ("Bolster", "long, removable cover", ["pillow", "cushion for neck", "sleeping pillow"]),
    ("Hosepipe", "kink-free, with fittings", ["garden tube", "watering line", "water the lawn"]),
    ("Cafetiere", "double wall, fine filter", ["coffee maker", "french press", "brew coffee"]),
    ("Anorak", "taped seams, adjustable hood", ["rain jacket", "windbreaker", "waterproof coat"]),
    ("Crockery set", "twelve pieces, stoneware", ["plates", "dishes for six", "dinnerware"]),
    ("Dumbbell pair", "hexagonal, rubber coated", ["weights", "strength training", "gym weights"]),
    ("Terrarium", "front doors, mesh top", ["reptile tank", "gecko home", "glass tank for pets"]),
    ("Bicycle pannier", "roll top, quick release", ["bike bag", "cycle luggage", "bag for commuting"]),
    ("Hotplate", "one zone, timer", ["portable stove", "camping cooker", "single burner"]),
    ("Dehydrator", "six trays, 35 to 70 degrees", ["fruit dryer", "make jerky", "dry herbs"]),
    ("Spirit level", "three vials, magnetic edge", ["straight wall tool", "bubble leveler", "hang pictures straight"]),
]
COLOURS = ["grey", "navy", "olive", "terracotta", "white", "black", "mustard", "teal"]
BRANDS = ["Vornhagen", "Tilbury & Ash", "Solvei", "Quillmark", "Ostrava Works", "Pennarth", "Ludo Fens"]
TRAITS = ["compact", "large", "foldable", "classic", "lightweight", "extra strong"]
OTHER_SCRIPTS = ["ソファ グレー", "Рюкзак дорожный", "Ποτήρι νερού", "مظلة شاطئ", "咖啡壶 双层"]


def products(random_: random.Random) -> list[dict[str, str]]:
    """Ten variants of each kind, with clean texts."""
    found = []
    for kind, description, _ in KINDS:
        for colour in random_.sample(COLOURS, 5):
            for trait in random_.sample(TRAITS, 2):
                brand = random_.choice(BRANDS)
                found.append(
                    {
                        "product_id": str(1001 + len(found)),
                        "name": f"{brand} {kind}, {colour}",
                        "brand": brand,
                        "description": f"{trait.capitalize()} {kind.lower()} in {colour}: {description}.",
                        "price": f"{random_.randint(900, 19900) / 100:.2f}",
                    }
                )
    return found


def with_defects(found: list[dict[str, str]], random_: random.Random) -> list[dict[str, str]]:
    """The rows as an export has them; the place of each defect is drawn."""
    rows = [dict(row) for row in found]
    places = random_.sample(range(len(rows)), 160)
    for n, place in enumerate(places):
        row = rows[place]
        text, brand = row["description"].replace("&", "&amp;"), row["brand"].replace("&", "&amp;")
        if n < 60:
            row["description"] = f"<p>{text}</p><ul><li>{brand}</li><li>Warranty:&nbsp;2&nbsp;years</li></ul>"
        elif n < 90:
            row["description"] = f"{text}<br/>Weight &lt; {random_.randint(2, 9)} kg"
        elif n < 110:
            row["description"] = (
                f"&lt;p&gt;{text}&lt;/p&gt;&lt;br&gt;Made by {brand.replace('&', '&amp;')}&amp;nbsp;Ltd"
            )
        elif n < 130:
            row["name"] = row["name"].replace("&", "&amp;")
        elif n < 145:
            row["description"] = ""
        elif n < 150:
            row["name"] = ""
        elif n < 155:
            row["name"] = OTHER_SCRIPTS[n - 150]
        elif n == 155:
            row["name"] = row["description"] = ""
    identical = [dict(rows[place]) for place in random_.sample(range(len(rows)), 4)]
    changed = [rows[place] | {"name": f"{rows[place]['name']} (2026)"} for place in random_.sample(range(250), 3)]
    return [*rows, *identical, *changed]


def day(moment: datetime.datetime, n: int) -> str:
    """One of four ways to write a day."""
    ways = (
        moment.date().isoformat(),
        moment.strftime("%d.%m.%Y"),
        moment.isoformat().replace("+00:00", "Z"),
        str(int(moment.timestamp() * 1000)),
    )
    return ways[n % 4]


def clicks(found: list[dict[str, str]], random_: random.Random, wanted: int = 385) -> list[dict[str, str]]:
    """Counts for each pair of a search and a product, as a shop adds them up."""
    rows: list[dict[str, str]] = []
    start = datetime.datetime(2026, 1, 5, 9, tzinfo=datetime.UTC)
    while len(rows) < wanted:
        kind = random_.randrange(len(KINDS))
        search = random_.choice(KINDS[kind][2])
        own = found[10 * kind : 10 * kind + 10]
        colour = random_.choice([None, None, *(row["name"].rpartition(" ")[2] for row in own)])
        fitting = [row for row in own if colour is None or row["name"].endswith(colour)]
        text = search if colour is None else f"{colour} {search}"
        if any(row["search_term"] == text for row in rows):
            continue
        for row in random_.sample(fitting, min(len(fitting), random_.randint(2, 4))):
            position = random_.randint(1, 10)
            number = max(1, round(40 / position * random_.random()))
            moment = start + datetime.timedelta(minutes=random_.randrange(170 * 24 * 60))
            rows.append(
                {
                    "search_term": text,
                    "product_id": f"{row['product_id']}.0",
                    "clicks": str(number),
                    "purchases": str(sum(random_.random() < 0.08 for _ in range(number))),
                    "position": str(position),
                    "day": day(moment, len(rows)),
                }
            )
    discontinued = [dict(row) | {"product_id": f"{9001 + n}.0"} for n, row in enumerate(random_.sample(rows, 7))]
    blank = [
        dict(row) | {"search_term": text} for row, text in zip(random_.sample(rows, 3), ["", " ", ""], strict=True)
    ]
    rows += [*discontinued, *blank]
    rows += [dict(row) for row in random_.sample(rows[:wanted], 5)]
    random_.shuffle(rows)
    return rows


def write(path: Path, rows: list[dict[str, str]], end: str) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())


def main(folder: Path = SHOP) -> None:
    random_ = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    found = products(random_)
    write(folder / "products.csv", with_defects(found, random_), "\r\n")
    write(folder / "clicks.csv", clicks(found, random_), "\n")


if __name__ == "__main__":
    main()
