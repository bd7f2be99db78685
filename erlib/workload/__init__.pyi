"""What is asked: corpora, and prompts cut from them."""

from .corpus import load_corpus as load_corpus
from .prompts import input_lengths as input_lengths
from .prompts import mix_table as mix_table
