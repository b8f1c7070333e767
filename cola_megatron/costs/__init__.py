"""What a part of a model costs: the words in which a family states it and planning reads it."""
