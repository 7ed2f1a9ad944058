"""The draft loop and how far it goes. Independent of the model runner."""
