"""From words to checked settings: schema, ranges, composition, identity. Imports no torch."""
