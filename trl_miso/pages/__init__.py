"""Self-contained HTML pages of the preview and the report: one template, with CSS and JavaScript in files of their own."""
