"""Titles to ids; text -> pieces -> ids:
vocabulary.py     a BERT vocab.txt, read and checked
wordpiece.py      BERT's tokenizer of a vocabulary learnt or read
tokenizer.py      `Tokenizer`: that, or any tokenizer.json (CLIP, SigLIP), and titles as packed ragged batches
"""

from .tokenizer import Tokenizer
from .vocabulary import SPECIALS, read_vocabulary

__all__ = ["SPECIALS", "Tokenizer", "read_vocabulary"]
