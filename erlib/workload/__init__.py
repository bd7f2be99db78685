"""What is asked: corpora, and prompts cut from them."""
