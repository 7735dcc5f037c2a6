"""The reference pages that are generated: each module makes one page, or two, from what the code says of itself."""
