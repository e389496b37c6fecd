"""The inference form of each family: norms folded, concatenations removed."""
