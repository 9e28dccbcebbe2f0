"""Reports: one self-contained HTML file about finished or unfinished runs."""
