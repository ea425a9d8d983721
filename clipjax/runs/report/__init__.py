"""Turns a run into a page: series, figures, sections, HTML."""
