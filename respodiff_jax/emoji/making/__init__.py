"""How Emoji World and its model are made: artwork, captions, training stages."""
