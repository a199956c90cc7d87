"""How a model reads several contexts, trained or not: its loss on given answers and the constraints that its own answers follow."""
