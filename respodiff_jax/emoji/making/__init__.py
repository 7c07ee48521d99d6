"""How Emoji World and its model are made: artwork, captions, and the stages of training."""
