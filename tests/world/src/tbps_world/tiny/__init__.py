"""Writers of tiny models, in the formats that the papers' flags read."""
