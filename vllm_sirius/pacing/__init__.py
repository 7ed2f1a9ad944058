"""How far to draft: the cost model, the draft's confidence, and the policies of both runners."""
