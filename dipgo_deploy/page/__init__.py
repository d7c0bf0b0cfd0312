"""Pages of HTML that need nothing else: shell, tables, pictures, charts as SVG. Pure functions of plain data."""
