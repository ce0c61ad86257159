"""The one block-reconstruction engine: executes plans. It names no method and no architecture."""
