"""VQ-Rec: items as learned codes of their texts."""
