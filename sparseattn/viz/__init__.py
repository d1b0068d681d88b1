"""Pictures of masks and errors, and the page that shows them."""
