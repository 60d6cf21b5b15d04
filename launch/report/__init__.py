"""Pages, charts and pictures for people: numbers and arrays in, files out."""
