"""The 200 words on signs. Every split draws from all of them, each with the same probability."""

WORDS = tuple(
    """
    apple april arrow art autumn bag baker bank barn bath beach bean bear bell bike bird boat book boots bowl box
    bread brick bridge bus butter cafe cake camp candy car card castle cat chair cheese city clock closed cloud coat
    coffee cold cook corn cow cream cup dance deer desk dog door down drive drum duck eagle earth east egg engine exit
    farm fast fire fish flag flat flower fly food forest fox fresh friend frog fruit game garden gate goat grape grass
    guest hall hand happy harbor hat heart help hill home honey horse hot hotel house ice inn iron island jam jazz
    juice june key king lake lamp leaf lemon lion lunch map market milk mill mint moon mouse music north nut oak ocean
    office old onion open paint paper park party pasta peach pear pen piano pizza plant pond pool post queen quiet rain
    rest rice river road roof room rope rose sale salt sand school sea seed shop silk sky snow soap soup south spoon
    sport star stone stop store storm sugar sun swan swim tea tennis tent tiger toast toys train tree tulip valley
    water west wheat wind winter wolf wood yard zebra zoo
    """.split()
)
