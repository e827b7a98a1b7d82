"""Write what people read: reports, model cards, curves."""
