"""Two chained attentions through landmarks; serves performer_attention and linformer_attention."""
