"""What is drafted: the draft loop and prompt lookup. Independent of the model runner."""
