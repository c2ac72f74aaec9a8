"""Titles to ids; text -> pieces -> ids:
vocabulary.py     a BERT vocab.txt, read and checked
wordpiece.py      BERT's tokenizer of a vocabulary learnt or read
tokenizer.py      `Tokenizer`: that, or any tokenizer.json (CLIP, SigLIP), and titles as packed ragged batches

`WordPiece` is the same class, by the name of what it makes when nothing is given.
"""

from .tokenizer import Tokenizer
from .vocabulary import SPECIALS, read_vocabulary

WordPiece = Tokenizer

__all__ = ["SPECIALS", "Tokenizer", "WordPiece", "read_vocabulary"]
