"""Pages to look at: one template and one chart set, HTML files that load nothing and need no server."""
