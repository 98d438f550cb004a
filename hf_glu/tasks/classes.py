"""Names of the classes of tasks that have many of them."""

NEWSGROUPS = tuple(
    """alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware comp.sys.mac.hardware comp.windows.x
    misc.forsale rec.autos rec.motorcycles rec.sport.baseball rec.sport.hockey sci.crypt sci.electronics sci.med
    sci.space soc.religion.christian talk.politics.guns talk.politics.mideast talk.politics.misc
    talk.religion.misc""".split()
)
REUTERS_8 = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
REUTERS_52 = tuple(
    """acq alum bop carcass cocoa coffee copper cotton cpi cpu crude dlr earn fuel gas gnp gold grain heat housing
    income instal-debt interest ipi iron-steel jet jobs lead lei livestock lumber meal-feed money-fx money-supply
    nat-gas nickel orange pet-chem platinum potato reserves retail rubber ship strategic-metal sugar tea tin trade
    veg-oil wpi zinc""".split()
)
BBC = ("business", "entertainment", "politics", "sport", "tech")
BROWN_GENRES = tuple(
    """adventure belles_lettres editorial fiction government hobbies humor learned lore mystery news religion reviews
    romance science_fiction""".split()
)
# the universal parts of speech (Petrov et al. 2012, https://arxiv.org/abs/1104.2086)
PARTS_OF_SPEECH = ("ADJ", "ADP", "ADV", "CONJ", "DET", "NOUN", "NUM", "PRON", "PRT", "VERB", ".", "X")
