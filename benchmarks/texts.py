"""Texts about ordinary things, on which drift and forgetting are measured."""

TEXTS = (
    "The river rises in the mountains and flows through three countries before it reaches the sea. Its lower part is "
    "wide and slow, and ships can go up as far as the old harbour.",
    "To bake bread, mix flour, water, salt and yeast, knead the dough for ten minutes, and let it rest until it has "
    "doubled in size. Then bake it in a hot oven.",
    "In 1905, a clerk of the patent office published four papers that changed physics. One of them explained why "
    "light sets electrons free from metal.",
    "She opened the window and looked down on the empty street. It had rained all night, and the lamps were still "
    "lit, though it was nearly morning.",
    "A list is sorted if no element is smaller than the one before it. Insertion sort takes each element and moves it "
    "back until it is in its place.",
    "The committee met on Tuesday and agreed to postpone the vote until the report on the costs of the bridge is "
    "available to all members.",
    "Bees find flowers by their colour and scent, and tell each other by a dance how far away these are, and in which "
    "direction from the sun.",
    "The two teams were level after ninety minutes, but in extra time the home side scored twice, to the delight of "
    "forty thousand spectators.",
)
