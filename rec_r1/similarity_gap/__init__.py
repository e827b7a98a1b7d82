"""The similarity-gap page: where being alike and being relevant part."""
