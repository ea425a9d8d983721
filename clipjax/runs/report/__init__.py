"""A run as a page: series, figures, sections, page."""
