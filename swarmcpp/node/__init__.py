"""The node process: everything joined. What decides is in the rooms below; here it is put together and told."""
