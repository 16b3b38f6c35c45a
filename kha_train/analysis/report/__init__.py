"""The report of a comparison as a page, as Markdown, and as pictures and numbers. One file a section."""
