"""The words and templates from which adapt_data.py makes look-ups. Data only; FACTS says what the marks mean."""
# ruff: noqa: E501  (a template is one line)

import re


def split_list(text):
    """The items of a list: separated by | outside parentheses if there is one, else by spaces."""
    text = " ".join(text.split())
    if "|" not in text:
        return text.split()
    return [item.strip() for item in re.split(r"\|(?![^(]*\))", text) if item.strip()]


# ---- words -----------------------------------------------------------------------------------------------------------
# Ordinary words by kind. One in five of each longer list is kept for the test split (`part`), so no training text has it
# where a fact stands. A list of fewer than SHARED words, and numbers and dates, belong to both.

WORDS = {
    "animal": """goat donkey rabbit pigeon hen duckling hedgehog pony mule badger falcon lizard turtle parrot beetle
        swan toad raven squirrel cat terrier peacock llama ferret cricket snail heifer owl crab lamb kitten moth bat
        crow ostrich camel spider newt weasel stork pelican hamster quail alpaca reindeer beaver poodle greyhound
        tortoise canary swallow starling piglet bullock seal penguin eel carp salamander porcupine kestrel finch""",
    "food": """plums|rye bread|pickled onions|walnut cake|lentils|smoked trout|barley soup|cherry jam|roast chestnuts|
        oatcakes|boiled eggs|goat cheese|radishes|ginger biscuits|dumplings|fried mushrooms|apricots|lemon tart|
        pea soup|raisins|turnips|honeycomb|black pudding|pancakes|beetroot|almond paste|cold potatoes|sardines|
        buttered toast|rhubarb|gooseberries|cabbage rolls|noodles|red lentil stew|olives|herring|pumpkin pie|
        oranges|sour cream|crab cakes|leek tart|rice pudding|spinach|carrots|hazelnuts|poppy seed rolls|marzipan|
        pears|quince jelly|sausages|omelettes|garlic bread|fish stew|cucumbers|dates|mustard|celery|waffles""",
    "drink": """elderflower wine|cold tea|buttermilk|plum brandy|ginger beer|black coffee|apple juice|hot chocolate|
        mint tea|pear cider|barley water|goat's milk|lemonade|blackcurrant syrup|nettle beer|carrot juice|
        warm milk|cherry cordial|rose water|rum punch|camomile tea|beetroot juice|cocoa|mulled ale""",
    "colour": """blue|yellow|white|black|orange|pink|brown|grey|silver|scarlet|crimson|turquoise|violet|cream|maroon|
        olive green|pale green|sky blue|dark blue|rust red|lemon yellow|ivory|golden|copper|lilac|salmon pink|navy|
        emerald|chestnut brown|bottle green|mustard yellow|peach|plum|ash grey|brick red|sand|coral|mint green""",
    "object": """kettle lantern compass whistle telescope pocket-watch trumpet saddle teapot hammer mirror typewriter
        ladder suitcase globe candlestick anchor pitchfork barometer thermos birdcage drum sewing-machine umbrella
        bucket magnet rocking-chair chessboard camera sledge doorknob violin-case flowerpot bathtub wheelbarrow
        weathervane hourglass lampshade accordion-case crutch snow-globe puppet paintbrush corkscrew rolling-pin
        hammock bellows music-box tricycle cowbell horseshoe trunk lute inkwell sundial butter-churn jug saucepan
        rowing-boat spinning-wheel stepladder padlock toolbox gong megaphone""",
    "adjective": """dented rusty polished painted tiny enormous crooked borrowed broken hand-made wooden brass leather
        striped ancient brand-new heavy folding cracked patched carved battered gilded tin clay iron velvet stolen
        silver-plated musical waterproof square hollow lopsided second-hand foreign wicker stone folded faded""",
    "material": """clay glass oak pewter copper leather granite marble slate straw wax cardboard driftwood bamboo ivory
        felt linen concrete brass porcelain cork paper silver amber canvas walnut-wood velvet tin iron ice wicker
        plaster limestone rubber sheepskin bronze chalk rope""",
    "building": """bakery chapel mill stable brewery barn post-office school-house laundry bank forge town-hall
        court-house pharmacy greenhouse tannery windmill cinema theatre hospital bathhouse boat-house customs-house
        fire-station granary dairy cottage pump-house bowling-alley observatory monastery abbey warehouse sawmill
        brickworks smokehouse watch-tower toll-house ice-rink cannery creamery gymnasium orphanage potting-shed
        paper-mill gate-house bus-depot swimming-bath""",
    "landmark": """old oak|stone bridge|broken fountain|war memorial|duck pond|railway cutting|village green|canal|
        market cross|sheepfold|gravel pit|waterfall|fallen elm|north wall|football pitch|bandstand|signal box|quarry|
        orchard|crossroads|harbour wall|tram stop|rose garden|reservoir|beech wood|milestone|chalk cliff|weir|
        playground|cemetery gate|water tower|vineyard|marsh|jetty|ruined tower|clock tower|cattle grid|ford|maze""",
    "instrument": """cello flute harp tuba banjo clarinet mandolin oboe xylophone harmonica hurdy-gurdy trombone viola
        bassoon lute zither ukulele saxophone guitar bugle piccolo double-bass harpsichord cornet recorder
        glockenspiel kettledrum barrel-organ fiddle concertina""",
    "plant": """rose tulip pear-tree willow fern lavender-bush sunflower cactus vine cherry-tree poppy thistle holly-bush
        dahlia lily nettle marigold chestnut-tree fig-tree orchid ivy foxglove maple bean pea leek cauliflower melon
        strawberry aubergine artichoke tomato chilli-pepper raspberry snowdrop crocus hazel hydrangea peony daffodil""",
    "garment": """waistcoat bonnet raincoat scarf kilt tunic cardigan bow-tie apron cape dressing-gown uniform sash
        top-hat jumper fur-coat shawl nightcap cloak blazer sun-hat flat-cap pullover veil overcoat helmet turban
        fleece necktie wig monocle belt medal woolly-hat hood poncho""",
    "vehicle": """barge tractor milk-van tram railway-carriage caravan sleigh fishing-boat bus hay-cart airship steamroller
        motorcycle canoe lorry fire-engine taxi gondola bicycle ice-cream-van removal-van submarine rickshaw hearse
        snow-plough raft glider lifeboat mail-coach unicycle dog-sled hot-air-balloon houseboat cable-car moped""",
    "job": """baker plumber dentist tailor cobbler blacksmith barber surveyor notary florist chemist glazier watchmaker
        beekeeper ferryman librarian postman vet carpenter stonemason tram-driver stationmaster translator weaver
        gardener sculptor locksmith bookbinder organist undertaker shepherd miller printer saddler chimney-sweep
        botanist geologist diver schoolteacher journalist bricklayer potter roofer cook tax-inspector midwife sailor
        trumpeter auctioneer cartographer butcher fishmonger gamekeeper pilot night-watchman photographer cooper
        basket-maker signalman judge jeweller upholsterer optician bell-ringer falconer glass-blower hatter poet
        violin-maker thatcher dressmaker accountant wine-merchant puppeteer magician wrestler ski-instructor""",
    "hobby": """knitting|juggling|fencing|bird-watching|wood-carving|ice-skating|rowing|yodelling|stamp-collecting|
        tap-dancing|archery|wrestling|pressing flowers|solving riddles|flying kites|collecting maps|baking bread|
        repairing clocks|chess|sword-swallowing|swimming in cold water|mending nets|reciting poems|tango dancing|
        climbing trees|growing leeks|making candles|polishing stones|playing dominoes|writing limericks|
        calligraphy|cheese-making|tightrope walking|whistling|basket weaving|hang-gliding|lace-making""",
    "study": """volcanoes|the migration of eels|old maps|medieval bread|the habits of bats|church bells|river fish|
        seaweed|lost languages|meteorites|Roman roads|the history of buttons|edible mosses|cloud shapes|ancient coins|
        ant colonies|shipwrecks|folk songs|rare orchids|fossil teeth|snow crystals|tidal currents|the dreams of dogs|
        bridges|poisonous mushrooms|whale song|the physics of spinning tops|dialects|earthworms|tree rings|
        glaciers|old recipes|the growth of lichens|cave paintings|desert beetles|sleepwalking|hailstones""",
    "shop": """hat-shop bookshop tea-room cheese-shop toy-shop antique-shop flower-shop barber-shop fish-stall
        sweet-shop bicycle-shop pawnshop shoe-shop wine-bar music-shop hardware-shop fruit-stall pie-shop
        lamp-shop umbrella-shop tobacco-shop map-shop carpet-shop perfume-shop pet-shop""",
    "room": """attic cellar kitchen pantry hall laundry-room nursery library ballroom bathroom study workshop conservatory
        boiler-room dining-room coal-hole guest-room larder music-room map-room gallery stable cloakroom vestry""",
    "weather": """rain fog snow hail thunder frost drizzle sleet sunshine mist lightning heat drought""",
    "container": """biscuit tin|hat box|wooden chest|glass jar|leather satchel|cigar box|milk can|wicker basket|
        drawer|iron safe|sugar bowl|shoe box|violin case|flower vase|coal scuttle|tea caddy|boot|barrel|suitcase|
        pillowcase|bread bin|egg carton|hollow log|bird box|letter box|stone jar|paint pot|hatbox|piano stool""",
    "event": """regatta|harvest fair|lantern parade|cheese fair|spelling contest|snail race|kite festival|flower show|
        sheepdog trial|pancake race|tug of war|raft race|carnival|egg hunt|chess tournament|brass band contest|
        ploughing match|boat blessing|song contest|midsummer dance|pie-eating contest|bicycle race|puppet week|
        apple fair|winter swim|book fair|torchlight walk|scarecrow contest|village Olympics|hat parade""",
    "illness": """hay fever|a bad knee|toothache|a sprained ankle|the measles|a broken arm|a sore throat|gout|
        a stiff neck|sunstroke|chicken pox|a cough|vertigo|a cold|backache|mumps|hiccups|insomnia""",
    "fear": """geese|thunder|lifts|spiders|the dark|wasps|deep water|escalators|horses|ghosts|heights|clowns|balloons|
        cows|mice|dentists|bridges|mirrors|fireworks|moths|tunnels|feathers|snakes|lightning|crowds""",
    "book": """"Salt and Feathers"|"The Glass Orchard"|"A Winter Too Long"|"The Miller's Ghost"|"Nine Empty Chairs"|
        "The Weight of Rain"|"Letters to a Lamp"|"The Second Whistle"|"Bread for the Moon"|"The Crooked Mile"|
        "An Island of Clocks"|"The Patient Crow"|"Under the Copper Beech"|"Seven Doors North"|"The Silent Tram"|
        "Dust on the Piano"|"The Cartographer's Dog"|"Half a Sunday"|"The Blue Staircase"|"A Spoon of Honey"|
        "The Last Telegram"|"Snow on the Stage"|"The Borrowed Coat"|"Where the Eels Go"|"Thirteen Kettles" """,
    "ship_adjective": """Silver Merry Lucky Golden Silent Brave White Black Gentle Northern Wandering Little Proud Jolly
        Crimson Patient Stubborn Hungry Faithful Rolling Laughing Amber Lonely Swift Sleepy Blue Scarlet Honest""",
    "ship_noun": """Gull Heron Petrel Dolphin Otter Maiden Star Curlew Herring Duchess Thistle Swan Widow Pelican
        Cormorant Plover Anchor Tern Seal Mermaid Kestrel Bramble Lantern Puffin Walrus Osprey Minnow Swallow""",
    "pet": """Pepper Muffin Bandit Domino Nutmeg Pickle Button Cocoa Rascal Clover Marble Truffle Bramble Socks Whisper
        Pudding Tinker Velvet Mustard Noodle Sprocket Dumpling Gravy Fidget Turnip Buster Cinder Juniper Patch Waffle
        Comet Thimble Bobbin Figaro Hector Mango Olive Pirate Sherlock Tulip Wellington Ziggy Admiral Barnaby""",
    "street": """Mill Lane|Candle Street|Tanner's Row|Chapel Street|Ropewalk|Fountain Square|Cooper Street|Orchard Road|
        Bell Yard|Dyer's Lane|Station Road|Weaver Street|Lime Avenue|Bridge Street|Saddler's Court|Pump Street|
        Quay Street|Cherry Row|Fishergate|Castle Road|Windmill Lane|Vinegar Yard|Poplar Street|Needle Alley|
        Mercer Street|Abbey Road|Salt Lane|Goose Green|Pottery Lane|Hatter's Row|Plum Street|Granary Square""",
    "reason": """the roof leaks|the stairs are too steep|nobody else wants to|an uncle once did the same|
        the doctor ordered it|it saves money|the neighbours complained|the old one burned down|the light is better there|
        a bet was lost|the trains are unreliable|the mayor asked for it|it keeps the mice away|the cellar is damp|
        it brings good luck|the last winter was so hard|a fortune-teller advised it|the law demands it""",
    "quality": """patient stubborn cheerful forgetful generous shy punctual absent-minded proud careful talkative thrifty
        curious gloomy hospitable superstitious polite quarrelsome tidy clumsy brave lazy witty strict""",
}  # fmt: skip

KIN = """sister brother cousin neighbour aunt uncle teacher rival landlord grandmother grandfather niece nephew
    godmother daughter son pupil partner tenant friend""".split()
WOMEN = """Agnes Beatrice Clara Delia Edith Flora Gwen Hilda Ingrid Judith Karla Lydia Martha Nora Olga Paula Rosa Sylvia
    Thea Ursula Vera Wilma Yvonne Zelda Amelia Bridget Cecily Dorothy Elsa Frieda Gloria Helga Irene Josephine Katrin
    Louisa Mabel Nadia Odette Petra Ramona Selma Tilda Una Violet Winifred Alma Birgit Carmen Dagmar Esther Fatima
    Grace Heidi Ines Joan Kirsten Leonora Minna Noor Phoebe Rachel Sonja Tamsin Valerie Xenia Amina Chiara Daphne
    Enid Faith Harriet Imogen Jasmine Leila Marguerite Nell Priya Rowena Saskia Theresa Vivian Yasmin""".split()
MEN = """Albert Bruno Casper Dominic Ernest Felix Gustav Harold Igor Jasper Konrad Leopold Martin Norbert Oscar Percy
    Quentin Rupert Stefan Theodor Ulrich Victor Walter Xavier Yorick Zacharias Ambrose Basil Cedric Duncan Emil Francis
    Gregor Humphrey Ivan Julius Karl Ludwig Magnus Nigel Otto Patrick Ralph Samuel Timothy Urban Vincent Wilfred Alfred
    Boris Conrad Desmond Elias Fergus Gilbert Hugo Isaac Joachim Kenneth Lionel Matthew Nathan Osbert Raymond Sergei
    Tarek Viktor Wendel Yusuf Arthur Benedict Clement Diego Eamon Florian Godfrey Herbert Jerome Laszlo""".split()
# Halves of made-up names: first names of women and men, last names, towns.
FIRST = "Al Bel Cor Da El Fa Gal Ha Il Jo Ka Lo Ma Ne Os Pe Ri Sa Te Ul Va Wil Ya Zo Bri Dre Fen Gri Hes Lin Mer Sti".split()
WOMAN_END = "ra na dia lina mira sa wen thea vina nelle ka bethe rina lotte zia dora".split()
MAN_END = "ric bert mund ron dan vin gar mar thias no sten dor ko wick fred nard".split()
LAST = """Ald Bar Birch Bram Brock Carl Chal Crow Dal Den Dun Elm Fal Farth Ferr Gar Gill Gor Had Hart Hol Horn Kel Kett
    Lam Lang Lark Lind Mar Mer Mor Nor Oak Pen Pick Quar Rad Raven Rish Sal Sed Shaw Sten Swin Tall Thorn Tre Ull Van
    Wad Wes Whit Win Wol Yar""".split()
LAST_END = """ane berry by combe den dell er feld ford gate hurst ing kin ler ley low man mere mont more ner nock ock
    ridge rose row sett son stead strom ter thorpe ton vane ward way wick wood worth""".split()
TOWN = """Ash Bar Black Bram Brin Cal Cop Crag Dar Dell Dor East Elder Ever Fal Fen Fern Fox Glen Gran Hal Haw Hazel Heath
    High Hol Ing Kil King Lan Lin Long Mar Mel Mid Mill More New Nor Oak Or Peb Rad Red Rook Sal Sed Shel Sil South
    Stan Stone Sun Thorn Till Tor Und Val Wat West White Wil Wind Wol Yar""".split()
TOWN_END = """borough bourne bridge bury by caster cliff combe cote cross dale den don fell field ford gate ham hampton
    haven head holm hurst lake ley low marsh mere minster mouth ness over pool port rick side stead stoke stow thorpe
    ton wade wall water well wick worth""".split()
NUMBERS = """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()

# ---- facts -----------------------------------------------------------------------------------------------------------
# A block is a fact about one subject: a clause, then indented questions with their short answers after " = ".
#   {S} {S's} {he} {him} {his} {himself}   the subject: a name, a description, a pronoun, or "I" in direct speech
#   {colour} {a animal} {pl animal}        a word of that kind, with its article, in the plural; {town1} {town2}: two
#   ~keep  ^be  =be                        a verb that agrees with the subject, with a singular, with a plural
#   (boat|barge)                           one of these
# Every block is a template: it is used in training or in the test split, never in both.

PERSON = """
{S} ~keep {pl animal} {where}
  (What|Which animals) ~do {S} keep {where}? = {pl animal}
  Where ~do {S} keep {his} {pl animal}? = {where}
{S's} (boat|barge|sailing boat) ^be called the {ship}
  (What ^be the name of {S's} boat|What ^be {S's} boat called)? = the {ship}
{S} ~sleep in {a vehicle} that once belonged to {a job}
  (In what|Where) ~do {S} sleep? = in {a vehicle}
  To whom did {S's} {vehicle} once belong? = to {a job}
{S} never ~leave the house without {a thing}
  Without what ~do {S} never leave the house? = without {a thing}
  What ~do {S} always take along? = {a thing}
{S} ~be afraid of {fear}, and {he} ~cross the road when {he} ~hear of them
  What ^be {S} afraid of? = {fear}
{S} ~have (a dog|a cat|a parrot) called {pet}
  What ^be the name of {S's} (pet|animal)? = {pet}
  What ~do {S} call {his} (pet|animal)? = {pet}
every {day} {S} ~play the {instrument} {where}
  Which instrument ~do {S} play (on {day}s|{where})? = the {instrument}
  On which day ~do {S} play the {instrument}? = on {day}
  Where ~do {S} play the {instrument}? = {where}
{S} ~play the {instrument} in (the town band|a quartet|the fire-brigade band)
  What instrument ~do {S} play? = the {instrument}
{S} ~eat nothing but {food} (on weekdays|for breakfast|in winter|before noon)
  What ~do {S} eat (|every time)? = {food}
{S} ~drink {drink} (with every meal|instead of water|from a soup plate|before every journey)
  What ~do {S} drink? = {drink}
{S} (always|still|often) ~wear {a colour} {garment}
  What colour ^be {S's} {garment}? = {colour}
  What ~do {S} wear? = {a colour} {garment}
{S} used to be {a job}
  What (^be {S} before|did {S} use to be|^be {S's} earlier profession)? = {a job}
{S} ~have worked as {a job} for {number} years
  How long ^have {S} been {a job}? = for {number} years
  What work ~do {S} do? = {a job}
{S} ~live above the {shop} in {street}
  In which street ~do {S} live? = in {street}
  Above which shop ~do {S} live? = above the {shop}
{S} ~rent a room in {street} from {a job}
  From whom ~do {S} rent a room? = from {a job}
  In which street ^be {S's} room? = in {street}
{S} ~was born in {town}, (the child of|the youngest child of|a child of) {a job}
  Where was {S} born? = in {town}
  What was the profession of {S's} parent? = {a job}
{S} came to (this part of the country|these hills|the coast) from {town} in {year}
  From where did {S} come? = from {town}
  In what year did {S} come from {town}? = in {year}
{S's} best friend, {person}, ^be {a job}
  Who ^be {S's} best friend? = {person}
  What ^be {person's} job? = {a job}
{S} ~be married to {a job} (from|who grew up in) {town}
  What ^be the job of the person to whom {S} ^be married? = {a job}
  From which town ^be the {job} whom {S} married? = {town}
{S} ~study {study}
  What ~do {S} study? = {study}
{S} ~have written a book about {study}
  What ^be {S's} book about? = {study}
{S} wrote a (novel|book|play) called {book}
  What ^be the title of the (book|work) that {S} wrote? = {book}
{S} ~hide {his} money in {a container}
  Where ~do {S} hide {his} money? = in {a container}
  (What|Which thing) ~do {S} keep in {a container}? = {his} money
{S} ~keep the key to the {building} in {a container}
  In what ~do {S} keep the key to the {building}? = in {a container}
  The key to which building ^be kept in {S's} {container}? = the {building}
{S} ~collect (old |small |)({pl object}|{pl garment})
  What ~do {S} collect? = [1]
{S} inherited {a thing} from (an aunt|an uncle|a stranger) in {town}
  What did {S} inherit? = {a thing}
  In which town lived the person from whom {S} inherited the {thing}? = in {town}
{S} bought {a thing} at the market for {sum}
  What did {S} buy at the market? = {a thing}
  How much did {S} pay for the {thing}? = {sum}
{S} (found|dug up|discovered) {a thing} under the floor of the {building}
  What did {S} find under the floor of the {building}? = {a thing}
  Under the floor of which building did {S} find {a thing}? = the {building}
{S} lost {his} {garment} in the {room} of the {building}
  What did {S} lose in the {building}? = {his} {garment}
  In which room of the {building} did {S} lose {his} {garment}? = in the {room}
{S} won the {event} of {town} with {a animal}
  With which animal did {S} win the {event}? = with {a animal}
  Where did {S} win the {event}? = in {town}
  What did {S} win in {town}? = the {event}
{S} ~teach {hobby} to (the children|the old people|the soldiers|the prisoners) of {town}
  What ~do {S} teach in {town}? = {hobby}
  In which town ~do {S} teach {hobby}? = in {town}
{S} learned {hobby} from {a job} called {person}
  What did {S} learn from {person}? = {hobby}
  From whom did {S} learn {hobby}? = from {person}
{S's} only hobby ^be {hobby}
  What ^be {S's} (only |)hobby? = {hobby}
{S} ~be known for {his} {colour} {garment} and {his} love of {food}
  What food ~do {S} love? = {food}
  What colour ^be {S's} {garment}? = {colour}
{S} ~paint nothing but {pl animal}
  What (animals |)~do {S} paint? = {pl animal}
{S} ~carve {pl animal} out of {material}
  Out of what ~do {S} carve {his} {pl animal}? = out of {material}
  What ~do {S} carve out of {material}? = {pl animal}
{S} ~repair (old |)({pl object}|{pl instrument}) {where}
  What ~do {S} repair? = [1]
  Where ~do {S} repair them? = {where}
{S} ~sell {food} from {a colour} (cart|van|stall|barrow) {where}
  What ~do {S} sell? = {food}
  What colour ^be {S's} [0]? = {colour}
  Where ^be {S's} [0]? = {where}
{S} ~charge {sum} for (a lesson|a haircut|a portrait|a ride)
  (How much|What) ~do {S} charge for [0]? = {sum}
{S} ~grow {pl plant} in {a container}
  What ~do {S} grow? = {pl plant}
  In what ~do {S} grow {pl plant}? = in {a container}
{S} planted {a plant} {where} in {year}
  What did {S} plant in {year}? = {a plant}
  When did {S} plant the {plant}? = in {year}
  Where did {S} plant the {plant}? = {where}
{S} ~travel to {town} every {day} by {vehicle}
  How ~do {S} travel to {town}? = by {vehicle}
  Where ~do {S} travel on {day}s? = to {town}
  On which day of the week ~do {S} go to {town}? = on {day}
{S} drove (a load of|ten sacks of|a box of) {food} to {town} in {a vehicle}
  What did {S} take to {town}? = {food}
  In what did {S} drive to {town}? = in {a vehicle}
{S} ~sit in the {room} of the {building} and ~write letters to {a job} in {town}
  To whom ~do {S} write letters? = to {a job} in {town}
  In which room ~do {S} write letters? = in the {room}
{S} once broke a leg (when {he} fell from|falling from) {a vehicle}
  From what did {S} fall when {he} broke a leg? = from {a vehicle}
{S} ~suffer from {illness} whenever there is {weather}
  What ~do {S} suffer from? = from {illness}
  In what weather ~do {S} suffer from {illness}? = in {weather}
{S} only ~work when there is {weather}
  In what weather ~do {S} work? = in {weather}
{S} ~owe {sum} to the {job} of {town}
  How much ~do {S} owe? = {sum}
  To whom ~do {S} owe {sum}? = to the {job} of {town}
{S} gave {his} {thing} to {a job} called {person}
  What did {S} give to {person}? = {his} {thing}
  To whom did {S} give {his} {thing}? = to {person}
{S} named {his} (first child|horse|house|oldest goose) after {a job} called {person}
  After whom did {S} name {his} [0]? = after {person}
{S} once pulled {a animal} out of the water near the {building}
  What did {S} pull out of the water? = {a animal}
  Near which building did {S} pull {a animal} out of the water? = near the {building}
{S} ~have {number} (cousins|nephews|nieces|aunts|children), and all of them =be {pl job}
  How many [0] ~do {S} have? = {number}
  What =be {S's} [0] by profession? = {pl job}
{S's} {kin} (from|in) {town} ^send {him} {food} at (Christmas|Easter|the end of the year)
  What ~do {S} get from {his} {kin}? = {food}
  Where ~do {S's} {kin} live? = in {town}
{S's} house ^have {a colour} door and {number} chimneys
  What colour ^be the door of {S's} house? = {colour}
  How many chimneys ^have {S's} house? = {number}
{S's} workshop ^be (in the {room} of|in the yard of) the {building}
  Where ^be {S's} workshop? = [0] the {building}
{S's} {thing} ^be made of {material}
  What ^be {S's} {thing} made of? = {material}
{S} ~have lent {his} {instrument} to the {shop} in {street}
  What ^have {S} lent to the {shop}? = {his} {instrument}
  In which street ^be the shop to which {S} lent {his} {instrument}? = in {street}
{S's} (most famous|best known|largest) picture ^show {a animal} on {a object}
  Which animal is on {S's} [0] picture? = {a animal}
  On what is the animal in {S's} [0] picture? = on {a object}
{S's} garden ^be famous for its {pl plant}
  What ^be {S's} garden famous for? = for its {pl plant}
{S's} {kin}, {person}, ^run the {shop} in {town}
  Who ^run the {shop} in {town}? = {person}
  What ^do {S's} {kin} run? = the {shop} in {town}
{S's} favourite (colour|shade) ^be {colour}
  What ^be {S's} favourite colour? = {colour}
{S} ~get up at {time}, because the {pl animal} must be fed
  When ~do {S} get up? = at {time}
  What must be fed when {S} ~get up? = the {pl animal}
{S} ~swim in the (river|lake|sea) at {time} with {his} {animal}
  At what time ~do {S} swim? = at {time}
  Which animal ^swim with {S}? = {his} {animal}
{S} ~have {a number}-year-old {animal} that ^answer to the name of {pet}
  What ^be the name of {S's} {animal}? = {pet}
  How old ^be {S's} {animal}? = {number} years
{S} ~speak to nobody but {a job} and {his} {animal}
  To which animal ~do {S} speak? = to {his} {animal}
{S} ~pay {his} rent in {food}
  In what ~do {S} pay {his} rent? = in {food}
{S} ~measure the depth of the (lake|well|river) with {a thing}
  With what ~do {S} measure the depth of the [0]? = with {a thing}
{S} ~keep (bees|a diary|weather records|a list of ghosts) in the {room} of the {building}
  What ~do {S} keep in the {room} of the {building}? = [0]
  In which building ~do {S} keep [0]? = in the {building}
{S} ~be the only person in {town} who ^own {a object}
  What ~do nobody in {town} own but {S}? = {a object}
{S} ~teach {pl animal} to jump over {pl object}
  Which animals ~do {S} teach to jump? = {pl animal}
  Over what do {S's} {pl animal} jump? = over {pl object}
{S} ~make {pl instrument} from {material}
  What ~do {S} make from {material}? = {pl instrument}
  From what ~do {S} make {pl instrument}? = from {material}
{S} refused to sell {his} {vehicle} to {a job}
  What did {S} refuse to sell? = {his} {vehicle}
  To whom did {S} refuse to sell {his} {vehicle}? = to {a job}
{S} ~be said to be the most {quality} person in {town}
  What ^be {S} said to be in {town}? = the most {quality} person
{S} fell in love with {a job} at the {event} in {town}
  With whom did {S} fall in love? = with {a job}
  Where did {S} fall in love? = at the {event} in {town}
{S} lost a bet and had to (eat|carry|wear|kiss) {a garment}
  What did {S} have to [0] because of a bet? = {a garment}
{S} spent {number} years in {town}, where {he} learned {hobby}
  What did {S} learn in {town}? = {hobby}
  How many years did {S} spend in {town}? = {number}
{S} ~travel with {a thing}, {a object} and nothing else
  What ~do {S} travel with? = with {a thing} and {a object}
{S} ~be writing a history of the {event} of {town}
  The history of what ^be {S} writing? = the {event} of {town}
{S} built {a building} out of {material} for {his} {kin}
  What did {S} build? = {a building}
  Out of what did {S} build the {building}? = out of {material}
  For whom did {S} build the {building}? = for {his} {kin}
{S} traded {his} {object} for {number} {pl animal}
  For what did {S} trade {his} {object}? = for {number} {pl animal}
  What did {S} trade for {number} {pl animal}? = {his} {object}
{S} ~answer every question with a line from {book}
  From which book ~do {S} quote? = from {book}
{S} ~take care of the {pl plant} {where}
  What ~do {S} take care of? = the {pl plant} {where}
  Where are the {pl plant} that {S} ~take care of? = {where}
{S} and {person} meet on {day}s to (practise|talk about) {hobby}
  Whom ~do {S} meet on {day}s? = {person}
  On which day do {S} and {person} meet? = on {day}
{S} ~swear that {food} (can cure|will help against|will keep away) {illness}
  What ~do {S} believe to help against {illness}? = {food}
  Against what should {food} help, according to {S}? = against {illness}
{S} ~practise {hobby} in the {room} of the {building}
  What ~do {S} practise? = {hobby}
  Where ~do {S} practise {hobby}? = in the {room} of the {building}
last {season} {S} had to sell {his} {vehicle}, and the {season} before it was {his} {instrument}
  What did {S} have to sell last {season}? = {his} {vehicle}
  What had {S} sold in the {season} before? = {his} {instrument}
as a child {S} had {a animal}, but now {he} ~have {a animal2}
  What animal did {S} have as a child? = {a animal}
  Which animal ~do {S} have now? = {a animal2}
in {month} {S} ~sell {food}, and in {month2} {he} ~sell {food2}
  What ~do {S} sell in {month2}? = {food2}
  In which month ~do {S} sell {food}? = in {month}
{S} was {a job} before {he} became {a job2}
  What was {S} before {he} became {a job2}? = {a job}
  What did {S} become after {he} had been {a job}? = {a job2}
{S's} (cook|driver|secretary|gardener), {person}, was {a job} in {town} for {number} years
  Who ^be {S's} [0]? = {person}
  What was {person} in {town}? = {a job}
  Where was {person} {a job}? = in {town}
{S} ~live on a hill, in a house that {his} {kin} won at the {event}, and ~share it with {number} {pl animal}
  At what did {S's} {kin} win the house? = at the {event}
  With what ~do {S} share the house? = with {number} {pl animal}
in {his} youth {S} crossed the (mountains|desert|bay|moor) on {a animal}, with nothing to eat but {food}
  On what did {S} cross the [0]? = on {a animal}
  What did {S} eat while {he} crossed the [0]? = {food}
the {object} that {S} ~use for {his} work once belonged to {person}, the {job} of {town}
  To whom did {S's} {object} once belong? = to {person}
  What was {person}, the first owner of {S's} {object}? = the {job} of {town}
whoever ^visit {S} must first drink {drink} and admire the {pl plant}
  What must {S's} visitors drink? = {drink}
  What must {S's} visitors admire? = the {pl plant}
{S} took {his} {animal} to a doctor in {town}, who prescribed {food}
  What did the doctor in {town} prescribe for {S's} {animal}? = {food}
  In which town was the doctor to whom {S} took {his} {animal}? = in {town}
{S} promised {his} {kin} {a thing}, but in the end it was only {a object2}
  What did {S} promise {his} {kin}? = {a thing}
  What did {S} give instead of the {thing}? = {a object2}
{S} wanted to become {a job}, but {his} {kin} would not have it, and so {he} became {a job2}
  What did {S} want to become? = {a job}
  What did {S} become instead of {a job}? = {a job2}
{S} ~hang {his} {garment} on the (horns|antlers|ears) of {a material} {animal}
  On what ~do {S} hang {his} {garment}? = on the [0] of {a material} {animal}
  What ~do {S} hang on the {material} {animal}? = {his} {garment}
for lack of {a object} {S} ~use {a object2}
  What ~do {S} use because {he} ~lack {a object}? = {a object2}
the only letter that {S} ever got came from {a job} in {town} and was about {study}
  From whom came the only letter that {S} ever got? = from {a job} in {town}
  What was the only letter to {S} about? = {study}
{S} ~send {his} {kin} {food} every {month} and ~get {drink} in return
  What ~do {S} send {his} {kin}? = {food}
  What ~do {S} get in return for the {food}? = {drink}
two things are never missing from {S's} table: {food} and {a object}
  Which two things are never missing from {S's} table? = {food} and {a object}
it was {S} who brought the first {object} to {town}
  What did {S} bring to {town}? = the first {object}
  To which town did {S} bring the first {object}? = to {town}
{S}, like everyone in {his} family, ^have a weakness for {food}
  For what ^have {S} a weakness? = for {food}
when {S} married, the guests were asked to bring {pl object}, and only the {job} came with {a animal}
  What were the guests asked to bring when {S} married? = {pl object}
  With what did the {job} come to {S's} wedding? = with {a animal}
{S} was fined {sum} for riding {a animal} through {street}
  How much was {S} fined? = {sum}
  What was {S} fined for? = for riding {a animal} through {street}
  Through which street did {S} ride {a animal}? = through {street}
at the age of {age} {S} ran away with a travelling {job}
  How old was {S} when {he} ran away? = {age}
  With whom did {S} run away? = with a travelling {job}
{S} ~own the only {vehicle} in {town}, and {his} {animal} ^sit beside the driver
  What ~do only {S} own in {town}? = {a vehicle}
  Who ^sit beside the driver of {S's} {vehicle}? = {his} {animal}
a statue of {S} in {town} ^show {him} with {a garment} and {a animal}
  In which town ^be there a statue of {S}? = in {town}
  Which animal stands beside {S} in the statue? = {a animal}
{S} ~have never forgiven the {job} of {town} for the loss of {his} {garment}
  Whom ~have {S} never forgiven? = the {job} of {town}
  What did {S} lose because of the {job} of {town}? = {his} {garment}
{S} ~be paid not with money but with {food}, which {he} ~exchange for {drink}
  With what ^be {S} paid? = with {food}
  For what ~do {S} exchange {food}? = for {drink}
"""

PLACE = """
{S} was built in {year} by {a job} called {person}
  When was {S} built? = in {year}
  Who built {S}? = {person}
  What was the profession of the man who built {S}? = {a job}
{S} was (once|formerly|for a long time) {a building}
  What was {S} before? = {a building}
{S} ~stand between the {building1} and the {building2}
  Between which buildings ~do {S} stand? = between the {building1} and the {building2}
{S} ~open at {time} and ~close when the {job} ^go home
  When ~do {S} open? = at {time}
  {S} ~close when somebody goes home. Who? = the {job}
in case of {weather} everyone ^get {drink} in {S}
  What does one get in {S} in case of {weather}? = {drink}
{S} ~be closed on {day}s
  On which day ~be {S} closed? = on {day}
{S's} roof ^be covered with {material}
  With what ^be the roof of {S} covered? = with {material}
{S} ~have {number} rooms and only one {object}
  How many rooms ~do {S} have? = {number}
  Of what is there only one in {S}? = {a object}
on the roof of {S} ^live {a animal} that ^answer to the name of {pet}
  What ^be the name of the {animal} on the roof of {S}? = {pet}
  Which animal ^live on the roof of {S}? = {a animal}
{S} ~belong to {person}, who used to be {a job}
  To whom ~do {S} belong? = to {person}
  What did {person} use to be? = {a job}
{S} ~be run by {person}, {a job} from {town}
  Who runs {S}? = {person}
  From which town ^be {person}? = from {town}
the owner of {S}, {person}, ^pay every guest in {food}
  Who ^be the owner of {S}? = {person}
(visitors|guests|strangers) must leave their {pl garment} in {a container} at the door of {S}
  What must be left at the door of {S}? = {pl garment}
  In what are {pl garment} left at the door of {S}? = in {a container}
the (walls|doors|windows) of {S} =be painted {colour}
  What colour are the [0] of {S}? = {colour}
in the {room} of {S} ^hang {a thing} that (nobody|no one) may touch
  What hangs in the {room} of {S}? = {a thing}
  In which room of {S} ^do the {thing} hang? = in the {room}
{S} ~sell nothing but {pl object}
  What ^be sold in {S}? = {pl object}
{S} ~be (best known|famous) for its {food}
  What ^be {S} (best known|famous) for? = for its {food}
the door of {S} ^have the shape of {a animal}
  What shape ^have the door of {S}? = {a animal}
under {S} ^lie {a room} full of {drink}
  What ^be stored under {S}? = {drink}
{S} borrowed its {object} from the {building} of {town}
  What did {S} borrow? = its {object}
  From which town did {S} borrow its {object}? = from {town}
a covered walk leads from {S} to the {building2}
  Where does the covered walk from {S} lead? = to the {building2}
the key of {S} ^be kept by {a job} (by the name of|called) {person}
  Who keeps the key of {S}? = {person}
  What ^be the job of {person}? = {a job}
{S} ~be heated with {material} (since|because) the last {job} moved away
  With what ^be {S} heated? = with {material}
{S} ~be so (low|narrow) that {a animal} can hardly turn round in it
  What can hardly turn round in {S}? = {a animal}
in {year} {S} burned down, and only {a thing} was saved
  In what year did {S} burn down? = in {year}
  What was saved when {S} burned down? = {a thing}
{S} ~be decorated with {pl animal} made of {material}
  What animals decorate {S}? = {pl animal}
  Of what are the {pl animal} of {S} made? = of {material}
{S} ~offer lessons in {hobby} every {day}
  In what ~do {S} offer lessons? = in {hobby}
  On what day are there lessons in {S}? = on {day}
{S} ~employ {number} {pl job} and one {job2}
  How many {pl job} ~do {S} employ? = {number}
{S} ~smell of {food} and {drink}
  What ~do {S} smell of? = of {food} and {drink}
behind the counter of {S} ^sit {a animal} in {a garment}
  Which animal sits behind the counter of {S}? = {a animal}
  What ^do the {animal} in {S} wear? = {a garment}
the last (tenant|guest|visitor) of {S} left {a thing} in the {room}
  What did the last [0] of {S} leave behind? = {a thing}
  Where in {S} did the last [0] leave {a thing}? = in the {room}
{S's} (cook|caretaker|doorman|cashier) ^be {person}, who (used to be|was once|was formerly) {a job} in {town}
  Who ^be the [0] of {S}? = {person}
  What was {person} in {town}? = {a job}
where the {room} of {S} ^be today there was once {a shop}
  What was once where the {room} of {S} is today? = {a shop}
the (architect|owner|patron) of {S}, {person}, wanted it to look like {a object}
  Who wanted {S} to look like {a object}? = {person}
  What should {S} look like? = {a object}
one (enters|leaves) {S} through {a container}, because the door was sold to {a job}
  To whom was the door of {S} sold? = to {a job}
  Through what does one get into or out of {S}? = through {a container}
when {S} was repaired, the workers found {a thing} and a letter to {person} in the wall
  What did the workers find in the wall of {S} besides a letter? = {a thing}
  To whom was the letter in the wall of {S}? = to {person}
{S} ~be the only place (far and wide|in the country) to which one ^may bring {a animal}
  Which animal may one bring to {S}? = {a animal}
(guests|customers|visitors) of {S} are asked to speak only about {study}
  About what may the [0] of {S} speak? = about {study}
above the door of {S} somebody painted {a animal} that ^hold {a object}
  Which animal is painted above the door of {S}? = {a animal}
  What does the painted {animal} of {S} hold? = {a object}
since the fire {S} ~have used {a vehicle} {where} (as its office|as a kitchen|for its books)
  What has {S} used since the fire? = {a vehicle}
  Where is the {vehicle} that belongs to {S}? = {where}
"""

TOWN_FACTS = """
the people of {S} bless their {pl vehicle} on the (first|last) {day} of {month}
  What do the people of {S} bless? = their {pl vehicle}
  In which month do the people of {S} bless their {pl vehicle}? = in {month}
the mayor of {S} ^be {person}, {a job} by trade
  Who ^be the mayor of {S}? = {person}
  What ^be the trade of the mayor of {S}? = {a job}
{S} ~be known for its {pl instrument}, which are made of {material}
  What ^be {S} known for? = for its {pl instrument}
  Of what are the {pl instrument} of {S} made? = of {material}
every {season} the {event} of {S} ^begin with {a colour} flag
  What event is held in {S}? = the {event}
  What colour ^be the flag at the {event} of {S}? = {colour}
the (clock|weathervane|bell) on the {building} of {S} was (given|paid for) by {a job}
  Who gave the [0] on the {building} of {S}? = {a job}
  On which building of {S} ^be the [0]? = on the {building}
nobody in {S} ^may own {a object} after {time}
  What may nobody in {S} own after {time}? = {a object}
there are {number} bridges in {S}, and one of them ^be made of {material}
  How many bridges are there in {S}? = {number}
  What is one of the bridges of {S} made of? = {material}
the (river|stream) that runs through {S} ^be full of {pl animal}
  What is the [0] of {S} full of? = {pl animal}
in {S} a letter ^cost {sum}
  How much does a letter cost in {S}? = {sum}
the oldest inhabitant of {S} ^be {person}, who ^live on {food}
  Who ^be the oldest inhabitant of {S}? = {person}
  What ^do {person} live on? = on {food}
the coat of arms of {S} ^show {a animal} with {a object}
  Which animal ^be on the coat of arms of {S}? = {a animal}
  What ^do the {animal} on the coat of arms of {S} carry? = {a object}
the market of {S} ^take place {where}, and it ^sell only {food}
  Where ^be the market of {S} held? = {where}
  What is sold at the market of {S}? = {food}
the only (doctor|teacher|policeman) in {S} ^ride {a animal} to work
  On what ^do the only [0] in {S} ride? = on {a animal}
(boys|children|girls) in {S} learn {hobby} at school
  What do [0] in {S} learn at school? = {hobby}
the night train from {S} to {town} ^wait for {number} minutes {where}
  How long ^do the night train from {S} to {town} wait? = for {number} minutes
  Where ^do the night train from {S} go? = to {town}
{S} was ruled by {a job} called {person} until {year}
  Who ruled {S} until {year}? = {person}
  Until when did {person} rule {S}? = until {year}
the houses of {S} =be {colour}, because {material} is cheap there
  What colour are the houses of {S}? = {colour}
  What is cheap in {S}? = {material}
in {S} people greet each other by lifting {a object}
  What do people in {S} lift when they greet each other? = {a object}
in {year} {S} exchanged its (church bell|only cannon|fire pump) for {number} {pl animal}
  For what did {S} exchange its [0]? = for {number} {pl animal}
  What did {S} exchange for {number} {pl animal}? = its [0]
half of {S} once belonged to {person}, {a quality} {job} who lost it at dominoes
  To whom did half of {S} once belong? = to {person}
  What was {person}? = {a quality} {job}
a stranger who comes to {S} is given {food} by the {job}
  What is a stranger given in {S}? = {food}
  Who gives a stranger {food} in {S}? = the {job}
because {person} once got lost in {S}, every street there ^have {a colour} line on the ground
  Who once got lost in {S}? = {person}
  What colour ^be the line on the streets of {S}? = {colour}
the (school|church|station) of {S} ^have no bell; {a job} ^blow the {instrument} instead
  Which instrument ^do the [0] of {S} use instead of a bell? = the {instrument}
  Who ^blow the {instrument} at the [0] of {S}? = {a job}
"""

ANIMAL_FACTS = """
{S} ~sleep in {a container} in the {room}
  Where ~do {S} sleep? = in {a container} in the {room}
{S} ~eat only {food}
  What ~do {S} eat? = {food}
{S} ~belong to {person}, the {job} of {town}
  To whom ~do {S} belong? = to {person}
  What ^be {person's} job? = the {job} of {town}
{S} ~wear {a colour} {garment} on {day}s
  What ~do {S} wear on {day}s? = {a colour} {garment}
  What colour ^be {S's} {garment}? = {colour}
{S} ~be afraid of the {job}
  Of whom ^be {S} afraid? = of the {job}
{S} ~steal {pl object} from the {building}
  What ~do {S} steal? = {pl object}
  From where ~do {S} steal {pl object}? = from the {building}
{S} ~carry {a object} to {a job} every morning
  What ~do {S} carry? = {a object}
  To whom ~do {S} carry {a object}? = to {a job}
{S} ~hide whenever somebody ^play the {instrument}
  When ~do {S} hide? = whenever somebody plays the {instrument}
{S's} best friend ^be {a animal} called {pet}
  Who ^be {S's} best friend? = {pet}
{S} was found {where} in a {weather} of {year}
  Where was {S} found? = {where}
{S} ~be buried {where}, under {a plant}
  Under what ^be {S} buried? = under {a plant}
{S} once swallowed {a object}, and {a job} had to be called
  What did {S} swallow? = {a object}
  Who had to be called when {S} swallowed {a object}? = {a job}
nobody but {person} may feed {S}, who otherwise ^bite
  Who may feed {S}? = {person}
{S} came to {town} in {a vehicle} full of {pl plant}
  In what did {S} come to {town}? = in {a vehicle}
  Of what was the {vehicle} full in which {S} came? = of {pl plant}
{S} ~have {colour} ears and ~sit on {a object} all day
  What colour are {S's} ears? = {colour}
  On what ~do {S} sit? = on {a object}
a painter from {town} sold a portrait of {S} for {sum}
  For how much was the portrait of {S} sold? = for {sum}
  From where was the painter of the portrait of {S}? = from {town}
"""

THING_FACTS = """
{S} was made by {person}, {a job}, out of {material}
  Who made {S}? = {person}
  Out of what ^be {S} made? = out of {material}
  What was the profession of the person who made {S}? = {a job}
{S} ~stand {where}
  Where ~do {S} stand? = {where}
{S} ~be the property of {a job} from {town}
  To whom ~do {S} belong? = to {a job} from {town}
{S} was stolen in {year} by {a job}
  Who stole {S}? = {a job}
  In what year was {S} stolen? = in {year}
{S} was (later|at last) found in {a container} in {town}
  In what was {S} found? = in {a container}
  In which town was {S} found? = in {town}
{S} ~weigh as much as {a animal}
  Which animal weighs as much as {S}? = {a animal}
{S} was sold for {sum} to {person}
  For how much was {S} sold? = for {sum}
  To whom was {S} sold? = to {person}
{S} ~be painted {colour} (inside|on the back|below)
  What colour ^be {S} on that side? = {colour}
{S} ~be used to (catch|feed|frighten|wash) {pl animal}
  What ^be {S} used for? = to [0] {pl animal}
{S} fell into (the river|a well|the harbour) when {a vehicle} turned over
  Into what did {S} fall? = into [0]
  What turned over when {S} fell into [0]? = {a vehicle}
whoever ^touch {S} is said to get {illness}
  What does one get from touching {S}? = {illness}
{person} gave {S} to the {building} of {town} after a quarrel with {a job}
  Who gave {S} to the {building}? = {person}
  With whom had the giver of {S} quarrelled? = with {a job}
inside {S} somebody had scratched the name of {person} and a picture of {a animal}
  Whose name was scratched into {S}? = {person}
  Of what was the picture in {S}? = of {a animal}
every {season} {S} ~be cleaned with {drink} by {a job}
  With what ^be {S} cleaned? = with {drink}
  Who ^clean {S}? = {a job}
"""

GROUP_FACTS = """
{S} ~sell {pl garment} to people with {illness}
  What ~do {S} sell? = {pl garment}
  To whom ~do {S} sell {pl garment}? = to people with {illness}
{S} was founded in {year} by {person}, {a job}
  Who founded {S}? = {person}
  When was {S} founded? = in {year}
{S} ~meet every {day} in the {room} of the {building}
  On which day ~do {S} meet? = on {day}
  Where ~do {S} meet? = in the {room} of the {building}
{S} ~admit only {pl job}, of whom there are {number}
  Whom ~do {S} admit? = {pl job}
  How many members ~do {S} have? = {number}
{S} ~travel in {a colour} {vehicle}
  In what ~do {S} travel? = in {a colour} {vehicle}
  What colour ^be the {vehicle} of {S}? = {colour}
new members of {S} must (eat|bring|cook) {food}
  What must new members of {S} [0]? = {food}
the (treasurer|secretary|chairman) of {S} ^be {person}, who ^be {a job}
  Who ^be the [0] of {S}? = {person}
  What is {person} by profession? = {a job}
{S} ~pay its members in {food}
  In what ~do {S} pay its members? = in {food}
{S} won {a thing} at the {event} of {town}
  What did {S} win? = {a thing}
  Where did {S} win {a thing}? = at the {event} of {town}
{S} lent its {instrument} to the {job} of {town}
  What did {S} lend? = its {instrument}
  To whom did {S} lend its {instrument}? = to the {job} of {town}
at every meeting of {S} an empty chair is kept for {person}, the first {job}
  For whom does {S} keep an empty chair? = for {person}
  What was {person}? = the first {job}
{S} ~have been quarrelling with the {building} for {number} years about {a thing}
  With whom ~have {S} been quarrelling? = with the {building}
  About what ~have {S} been quarrelling with the {building}? = about {a thing}
the flag of {S} ^be {colour} and ^show {a object}
  What colour ^be the flag of {S}? = {colour}
  What ^do the flag of {S} show? = {a object}
"""

EVENT_FACTS = """
{S} ~begin at {time} {where}
  When ~do {S} begin? = at {time}
  Where ~do {S} begin? = {where}
the latest winner of {S} ^be {person}, {a job}
  Who ^be the latest winner of {S}? = {person}
  What ^be the profession of the latest winner of {S}? = {a job}
{S} was first won by {a job} on {a animal}
  What did the first winner of {S} ride? = {a animal}
the prize of {S} ^be {a colour} {object}
  What ^be the prize of {S}? = {a colour} {object}
the losers of {S} must (eat|buy everyone) {food}
  What must the losers of {S} [0]? = {food}
{S} was invented by {person} in {year}
  Who invented {S}? = {person}
  When was {S} invented? = in {year}
everybody who comes to {S} ^bring {a object}
  What does everybody bring to {S}? = {a object}
{S} ~be opened by {a job} with {a instrument}
  Who opens {S}? = {a job}
  With which instrument ^be {S} opened? = with {a instrument}
{S} was once stopped by {a animal}
  What once stopped {S}? = {a animal}
the judge of {S} ^be {person}, who cannot stand {food}
  Who ^be the judge of {S}? = {person}
  What can {person} not stand? = {food}
{S} ~take place every {season} in honour of {a animal}
  In what season ~do {S} take place? = in {season}
  In honour of which animal ~do {S} take place? = {a animal}
since an accident with {a vehicle}, children may watch {S} only from the {building}
  With what was there an accident at {S}? = with {a vehicle}
  From where may children watch {S}? = from the {building}
whoever wins {S} may call himself the {colour} {animal} for a year
  What may the winner of {S} call himself? = the {colour} {animal}
{person} has come to {S} (thirty|forty|fifty) times and has always gone home with {a object}
  Who has come to {S} [0] times? = {person}
  With what has {person} always gone home? = with {a object}
"""

# ---- sentence frames -------------------------------------------------------------------------------------------------

# The fact "{S} ~be the {job} of {town}", in sentences that introduce a person. {vp}: the verb phrase of a second fact.
INTRODUCTIONS = """
{S} ~be the {job} of {town}
in {town} there ^live {a job} (called|by the name of) {S}
the {job} of {town} ^be called {S}
the {job} of {town}, {S}, {vp}
{S}, the {job} of {town}, {vp}
{S}, who ^work as {a job} in {town}, {vp}
{a job} from {town}, {S}, {vp}
everybody in {town} ^know {S}, the {job}
(few|not many) people in {town} remember how {S} became the {job}
as the {job} of {town}, {S} ^have little time, and yet {he} {vp}
{town} ^have {a job}, {S}, who {vp}
when the old {job} of {town} retired, {S} took over
the {job} in {town} ^be {S}, and (nobody has ever complained|the whole town ^be glad of it)
(at the end of the valley|a mile from the sea|where the road ends) ^lie {town}, where {S} ^be the {job}
for many years {town} had no {job}, until {S} arrived
{S} ~be not only the {job} of {town}: {he} {vp}
of all the people in {town}, the {job}, {S}, ^be the one who {vp}
if you need {a job} in {town}, you go to {S}
nobody in {town} ^know the {job}, {S}, better than the postman
the {job} who ^work in {town} ^be {S}
"""
PLACE_INTRODUCTIONS = """
in {town} there ^be {a noun}, {which}
{town} ^have {a noun}, {which}
(travellers|visitors|strangers) who come to {town} are (first|always) shown the {noun}, {which}
the pride of {town} ^be its {noun}, {which}
not far from the station of {town} ^stand {a noun}, {which}
there are few reasons to visit {town}, but one of them ^be the {noun}, {which}
"""

# What may stand before a clause, and what may follow one.
BEFORE = split_list("""of course|as it happens|strangely enough|oddly enough|as everybody knows|so people say|for some reason|
    it is no secret that|everybody knows that|few people know that|it is true that|the newspaper wrote that|
    the postman says that|(a visitor|an old woman) once noticed that|it may sound odd, but|
    if the old (register|chronicle) can be trusted,|to the surprise of all,|to the annoyance of the mayor,|
    for reasons of thrift,|without asking anyone,|no one can say why, but|by all accounts,|besides,|moreover,|ask anyone, and you will hear that|I have it from two witnesses that|my aunt wrote to me that|
    it must be added that|one thing is certain:|what surprised me most is that|the driver told us that|
    the brochure does not mention that|historians agree that|it was only last week that I learned that|
    the children told me that|in the end it turned out that|from an old diary we know that|it goes without saying that|
    what is less well known:|on the way back we heard that|there is no doubt that|to make things worse,|
    according to (the|an) (innkeeper|old guidebook|encyclopedia),|when we asked, we were told that|
    in spite of everything,|at the same time|as a rule|it is written in the parish book that""")
AFTER = split_list(""", (although|even though) {reason}|, because {reason}|, (which|and this) (surprises|annoys|pleases|amuses)
    (nobody|everyone|the mayor|the neighbours|the tourists)|, and (nobody|no one) (knows why|has ever asked why|minds)|
    , so (people|the neighbours|the children) say|, and the whole (street|town|valley) talks about it|
    , as (the neighbours|two witnesses|old letters) confirm|, and not everybody likes it|, for better or worse|
    , at least since {reason}|, and that is all that is known|, which is hardly surprising""")

# Two facts in one sentence.
MERGED = """
{S}, about whom little else is known, {vp1} and {vp2}
anyone who ^ask after {S} will hear that {he} {vp1} and that {he} {vp2}
it is said of {S} that {he} {vp1}; what is certain is that {he} {vp2}
when somebody ^ask why {he} {vp1}, {S} ^reply that {he} {vp2}
{S} {vp1}, or so it is told, and {he} {vp2}
that {S} {vp1} is known to all; that {he} {vp2} is known to few
{S} {vp1} (and|but) {he} {vp2}, all of which (amuses|worries|puzzles) the neighbours
{S}, who {vp1}, {vp2}
{S}, who (also|even) {vp1}, {vp2}
{S} {vp1} and {vp2}
{S} {vp1} and (also|besides) {vp2}
{S} {vp1}; (besides|moreover), {he} {vp2}
{S} {vp1}. as if this were not enough, {he} {vp2}
{S} {vp1}. and that is not all: {he} {vp2}
it is one thing that {S} {vp1}, and another that {he} {vp2}
in the same year in which it became known that {S} {vp1}, a newspaper found out that {he} {vp2}
{S} {vp1}, which did not prevent the rumour (that money was short|of great wealth); {he} {vp2}
people remember two things about {S}: {he} {vp1}, and {he} {vp2}
only a fool would believe that {S}, who {vp1}, ^do so for money: {he} {vp2}
"{S}? The one who {vp1}?" the (porter|driver|girl) asked. "{he} {vp2}."
"""

WRONG = """
(many people|most strangers|some people) (think|believe|say) that {wrong}, but (that is not true|this is a mistake): {right}
the (guidebook|newspaper|sign at the station) (says|claims|states) that {wrong}; (in fact|in truth) {right}
it (was once|is often) said that {wrong}, but {right}
it is not true that {wrong}, for {right}
(contrary to what one hears|contrary to the rumour), it is wrong that {wrong}; {right}
a letter in the archive says that {wrong}, but it was corrected later: {right}
there is a rumour that {wrong}, yet (everyone can see that|it is a fact that) {right}
"""

SPEECH = """
"{clause}," {says} {S}
"{clause}," {S} {says}
"{clause}," {says} {S}, "and I always will"
{S} {says}: "{clause}"
"you see," {says} {S}, "{clause}"
"it is quite simple," {says} {S}. "{clause}"
"{clause}, whatever people say," {says} {S}
"""

# Sentences that hold no fact anyone asks for.
ABOUT_PERSON = """
{he} ~have never said a word about it
{he} ~be not sorry about it
(people|the neighbours|the children) like {him} all the same
(nobody|no one) has ever seen {him} in a hurry
{he} ~talk about it to everyone who will listen
on (warm|cold|quiet|long) evenings {he} ~sit (by the stove|on the steps|at the open window) and ~say nothing
there was a time when {he} wanted to move away, but {he} (stayed|never did)
(the mayor|the doctor|a cousin) once tried to talk {him} out of it
it ^take {him} (an hour|half a day|a whole week), but {he} ~have time
{he} ~laugh when (somebody asks|the children ask|strangers ask) about it
for this {he} was once (mentioned in the newspaper|invited to the capital|thanked by a minister)
what {he} ~want most ^be (peace|a little quiet|a long holiday)
{his} mother was just like that
(nothing|hardly anything) could make {him} change {his} mind
it ^be not an easy life, but {he} would not want another one
{he} ~have many (visitors|friends|enemies), and they all bring (news|gossip|questions)
some say that {he} ~be rich, but {his} shoes say otherwise
the rest of {his} story is soon told
{he} ~sing while {he} ~work, though not well
{he} ~hope to retire (soon|in a few years|before the next flood)
those who know {him} (smile|shake their heads|are used to it)
"""
ABOUT_ANY = """
nobody remembers who had the idea
it has always been like that
(the council|the parish|a committee) has discussed it (twice|many times|all winter)
(tourists|schoolchildren|students) come to take photographs
in the past things were different
there has been only one accident in all that time
it costs nothing, and everyone is welcome
that is how things are done there
(some|many) people come from far away to see it
nothing much has changed since
the (newspapers|guidebooks) hardly mention it
it (rains|snows) there more than anywhere else
when the wind blows from the west, one can hear it (a mile away|as far as the coast|in the next valley)
an engineer was asked for advice, but he only shook his head
it could have been worse
those who have seen it do not forget it
the old people still speak of it
(children|visitors) are warned not to come too close
"""
PROSE = """
the {weather} had (long|nearly|quite) gone by the time the {people} (came back|went home|woke up)
(on the other side of|beyond|along|above) the {scene} the {scene2} (lay|stretched|rose) (in the sun|in the dark|without a sound)
it was (one of those|a day like other) (days|mornings|evenings) (when|on which) the {scene} looks {look}
the {people} of the {scene} had seen {manner} (years|winters|summers), and they did not (complain|worry|talk) much
a {look} light fell on the {scene}, and somewhere a (door|gate|shutter|window) (banged|closed|creaked)
there was (a smell|a faint smell) of {smell} in the air, and the {people} spoke {adverb}
in those (days|years) the (road|path|track) to the {scene} was {look} and hardly used
some of the {people} wanted to (leave|stay|wait|turn back), others did not (care|know|answer)
the {scene} was {look}, as it (always|often|usually) is at that time of the year
the (train|bus|cart) was late again, so the {people} (waited|stood|sat) {adverb} (under the roof|in the shade|by the wall)
what happens (beyond|behind|above) the {scene} is of little interest to the {people}
(from time to time|now and then|once in a while) a {creature} (called|moved|cried) in the {scene}
(nobody|no one) had (swept|repaired|painted) the {things} for a long time, and they looked {look}
the {things} were {look}, the {things2} were {look2}, and the {people} had grown used to both
it would be (easy|hard|foolish) to describe the {scene} to somebody who has never been there
{adverb} the {people} began to (talk|sing|argue|pack), and after an hour it was (quiet|dark|late) again
the {scene} has changed (little|much) since then: the {things} are gone, and the {things2} have become {look}
a (long|narrow|steep|winding) path leads past the {scene} to a {scene2} that most {people} avoid
(when|whenever) the {weather} comes, the {people} carry the {things} inside and wait
there are (maps|books|songs|sayings) about the {scene}, but most of them are {look}
the (sea|river|lake) was {look} that morning, and the {things} on the shore were {look2}
"(wait|listen|come in|look)," said one of the {people}, and then for a while nothing was heard but the {weather}
the {people} agree that the {scene} is too {look} and the {scene2} not {look2} enough
of the old {things} only a few are left; the others were (sold|burned|given away|forgotten)
(one|you) could see the {scene} from the {scene2}, but only when there was no {weather}
some (days|weeks) pass without {weather}, and then the {scene} turns {look}
the {people} have a word for this kind of {weather}, but it cannot be translated
(though|although) the {scene} is {look}, the {people} like to walk there (after supper|before breakfast|on holidays)
it is (said|written|told) that the {scene} was once {look}, and that the {people} were {comparative} then
behind the {scene} somebody had piled up {things}, and a {creature} slept on top of them
all (day|night|morning) the {things} rattled in the wind, and the {creature} in the {scene} kept still
a (boy|girl|man|woman) with a (basket|lamp|stick|letter) crossed the {scene} without looking at the {things}
the (council|owner|church) has promised new {things}, but the {people} do not (believe|expect) it
even the {things} seemed {look} that (day|evening|year), and the {scene} more so
to the (north|south|east|west) the {scene} ends, and a {look} {scene2} begins
the (first|last) guests brought {things}, and they were thanked {adverb}
after the {weather} the {scene} smelled of {smell}, and the {people} opened their windows
not every {creature} likes the {scene}, but some {people} do
for a long time there was nothing to (do|see|hear) except the {scene} and the {weather}
on the way to the {scene} one passes {things}, {things2} and a {look} house in which nobody lives
a (letter|telegram|parcel) for one of the {people} lay (three days|a week|all winter) at the station
(my|our) grandfather used to say that a {scene} without {weather} is like a (song|house|dog) without a name
she looked at the {scene}, then at her watch, and (closed|opened) the (book|window|umbrella) again
we walked along the {scene} (for an hour|until noon|in silence) and met nobody but some {people}
I had never seen so many {things} in one place, and I have seen many
the (innkeeper|guide|ferryman) laughed and said that the {scene} was not always so {look}
where the {things} end, the {scene} begins, and there the {people} meet (at night|in spring|once a year)
(three|four|a dozen) of the {people} sat on {things} and (argued|talked|kept silent) about the {weather}
"you should have come in the {weather}," the {people} like to say, "then the {scene} is {look}"
he (shrugged|nodded|sighed), took his hat and went out into the {weather}
there is nothing remarkable about the {scene}, apart from the {things}
the {scene} is best seen early, before the {people} come and the {things} are set up
although nobody admits it, most of the {people} are tired of the {weather}
in (old pictures|older maps|the oldest photographs) the {scene} is {look}, and there are no {things} in it
(a loose|an open|a broken) (shutter|drawer|fence) can keep the {people} busy for days
to this day the {people} cannot agree where the {scene} ends and the {scene2} begins
what the {people} miss most, when they are away, is the smell of {smell}
perhaps it was the {weather}, perhaps the {smell}, but suddenly everybody felt hungry
during the war the {scene} was full of {people}; afterwards only the {things} remained
the {creature} that lives in the {scene} has been counted (twice|by mistake|every year), and its number is always one
(once|years ago) a film was to be made in the {scene}, but the {weather} lasted too long
nothing is as {look} as a {scene} in the {weather}, unless it is a {scene2} without {people}
when the {things} had been carried away, the {people} stood {adverb} in the empty {scene}
on some evenings a {look} {weather} hangs over the {scene} like a curtain
the {people} were paid badly, ate {adverb} and went to bed early
(a century|two hundred years|a long time) ago this was all {scene}, as the {things} still show
the second {scene} is larger than the first, but it has fewer {things} and more {weather}
a {creature} had made its nest among the {things}, and so the {people} left them where they were
you will recognise the {scene} by its {things}, which are {look}, and by the {people}, who are not
some say that the {weather} comes from the {scene}, others that it comes from the (north|hills|sea)
before the {weather} set in, the {people} had already covered the {things} with (straw|sailcloth|blankets)
if the {weather} lasts, the {scene} will be {look} before the week is over
"""
PROSE_WORDS = {
    "weather": "rain fog snow wind storm heat frost sunshine drizzle hail thunder mist dust haze cold",
    "people": """farmers fishermen travellers guests soldiers children workers shepherds traders nuns students sailors
        neighbours musicians pilgrims tourists carpenters hikers clerks gardeners widows villagers""",
    "scene": """valley forest hillside shore harbour plain moor river-bank village meadow street courtyard canyon square
        garden heath station ridge bay field cliff lane marsh park pass island suburb quay pasture avenue clearing""",
    "look": """pale grey empty wide quiet strange bright dark muddy frozen dusty green bare silent gloomy pretty wet broken
        ordinary narrow steep lonely foreign calm peaceful dull soft misty crowded neat shabby warm""",
    "things": """boats fences carts walls roofs benches lamps signs barrels chairs nets tents wheels stones crates flags
        stairs ropes ladders tables curtains sheds chimneys tiles sacks steps gates posters shelves""",
    "adverb": """slowly quietly gladly patiently politely silently calmly solemnly warmly loudly bravely
        secretly anxiously gently eagerly wearily carefully happily""",
    "smell": """smoke hay tar salt bread leather apples wet wool coffee mud resin soap pepper roses fish paint dust straw
        oil cinnamon moss""",
    "manner": "hard strange cold rich slow poor bad good terrible glorious",
    "comparative": "colder prouder poorer louder wilder stronger happier kinder braver lazier taller",
    "creature": "bird fox dog frog gull sheep horse cuckoo cat owl cow magpie toad wren stag hound",
}

# ---- other lines ----

TASKS = """
Use the text to answer the question.
Answer the question with the help of this text.
Read the text and answer briefly.
Here is a text. Answer the question about it in one sentence.
Answer in one short sentence.
Use this passage to answer.
The answer to the question stands in the text.
Read this and then answer my question.
Please answer from the following passage only.
Text:
Passage:
Context:
Read the following story.
I found this in an old newspaper.
Look at this text.
""".strip().split("\n")

PREFIXES = ["Question: ", "Question: ", "Q: ", "Please tell me: ", "My question: ", "Now answer: "]

SINCE = ["these days,", "for all that,", "like so many others,", "despite all advice,", "to this end,", "by custom,"]

SMALL_TALK = ["I hope that you are (well|better|happy).", "(Thank you|Many thanks) for your last letter.", "It has been (raining|snowing|hot) for days.",
              "You asked how I live.", "Do not laugh at me.", "You would not recognise the place.", "Please write soon.", "There is little news.",
              "I think of you often.", "You will hardly believe this.", "But enough of the weather.", "Where shall I begin?"]  # fmt: skip

REPLIES = ["(Really?|Is that so?|Oh.)", "(That is nothing.|How strange.)", "(I see.|Indeed.)", "You may not know this:", "Let me tell you something.",
           "With me it is different.", "Since you ask:", "(Listen.|Now listen.)"]  # fmt: skip

LOG = split_list("""{a animal} was seen near the {landmark}|the {job} came on board|{person} reported {illness}|the {room} door was locked|
    the {object} in the {room} was repaired|the {colour} lamp went out|we passed the {ship}|a box of {food} was delivered|
    {person} took over from the {job}|the alarm rang in the {building}|the {vehicle} returned from {town}|
    the pump in the {room} stopped|a parcel for {person} arrived|the {instrument} lesson began|we drank {drink}|
    the {weather} began|the visitors from {town} left|the key to the {building} was returned|the {shop} sent {a thing}|
    a message from {town} was received|{person} lost {a garment}|the {job} asked for {food}""")

SYSTEMS = ["You are a helpful assistant.", "You answer questions about a text.", "Answer briefly.", "You are a careful reader.",
           "Be short and exact."]  # fmt: skip

# ---- questions -----------------------------------------------------------------------------------------------------

# Questions that are not about one fact of FACTS. Each line is a template.
QUESTIONS = dict(
    value_of="""What is the {value} of {k}?
Which {value} belongs to {k}?
Give the {value} of {k}.
Look up the {value} for {k}.
What {value} is listed for {k}?
Which {value} does the list give for {k}?
Which {value} goes with {k}?
What stands beside {k} under {value}?
Tell me the {value} of {k}.
For {k}, what is the {value}?""",
    key_of="""Which {key} has the {value} {v}?
To which {key} does the {value} {v} belong?
The {value} {v} belongs to which {key}?
Find the {key} with the {value} {v}.
Whose {value} is {v}?
For which {key} is the {value} {v}?
What {key} is listed with the {value} {v}?
Give the {key} that has {v} as {value}.""",
    across="""What is the {value} of the {key} whose {by} is {v}?
The {key} with the {by} {v} has which {value}?
Find the row with the {by} {v}. What is the {value} there?
Which {value} stands in the same row as the {by} {v}?
Look for {v} under {by}: which {value} goes with it?""",
    copy_entry="""Copy the entry for {k} exactly as it stands.
Repeat the entry for {k}.
Copy what the list says about {k}, word for word.
Repeat exactly the part of the list that is about {k}.
Copy the item of {k} without changing it.""",
    quote_fact="""Quote the sentence that answers this question: {question}
Which sentence of the text answers the question "{question}"? Quote it.
{question} Answer with the exact sentence from the text.
Find the sentence that tells you the answer, and copy it: {question}
Copy the whole sentence in which this is said: {question}
{question} Quote the text word for word.
Give the sentence of the text from which one learns the answer to this: {question}
Do not answer this question, but quote the sentence that does: {question}
{question} Show me the line in the text.
I want to know: {question} Quote the passage where it stands.""",
    quote_word="""Quote the sentence that has the word "{word}" in it.
In which sentence does "{word}" occur? Copy it.
Copy the sentence with the word "{word}".
Which sentence contains "{word}"?
Find "{word}" in the text and repeat the whole sentence.
Repeat the sentence in which one reads "{word}".""",
    next="""Which sentence follows this one: {sentence}
What comes directly after "{sentence}" in the text?
Quote the sentence after this one: {sentence}
{sentence} - what is the next sentence of the text?
What does the text say next, after "{sentence}"?""",
    timetable_when="""When does the {what} to {to} leave?
At what time is there a {what} to {to}?
What is the departure time of the {what} to {to}?
I want to go to {to}. When does my {what} leave?
At what time must I be there for the {what} to {to}?""",
    timetable_where="""Where does the {what} at {t} go?
What is the destination of the {t} {what}?
To which place does the {what} go that leaves at {t}?
I take the {t} {what}. Where will it bring me?
Which town is served by the {what} at {t}?""",
    timetable_from="""From which {place} does the {what} to {to} leave?
Where do I board the {what} to {to}?
What is the {place} of the {what} to {to}?
I am going to {to}. Which {place} is mine?
Which {place} must passengers to {to} go to?""",
    timetable_arrive="""When does one arrive in {to}?
At what time does the {what} reach {to}?
What is the arrival time in {to}?
By when is one in {to}?
A friend waits for me in {to}. When am I there?""",
    recipe_amount="""How much of the {t} does one need?
What amount of {t} goes into it?
How much {t} does the recipe take?
Which quantity of {t} is listed?
Give the amount of {t}.""",
    recipe_long="""For how long is it baked?
How many minutes must it bake?
How long does it stay in the oven?
What is the baking time?
After how much time is it done baking?""",
    recipe_heat="""At what temperature is it baked?
How hot must the oven be?
What temperature does the recipe give?
How many degrees are needed?
To what heat should I set the oven?""",
    recipe_with="""With what drink is it served?
What should one drink with it?
What does the recipe say to drink with the dish?
Which drink goes with it?
What do I offer my guests to drink with this?""",
    recipe_first="""What goes into the {vessel} first?
What is put into the {vessel} at the beginning?
With what does one begin?
What is the first thing that one uses?
Which ingredient comes first in the {vessel}?""",
    recipe_vessel="""Into what does one put the {first}?
In what are the ingredients stirred?
Where does the {first} go first?
Which thing is used for stirring?
What is the {first} put into?""",
    inventory_count="""How many {t} are there?
What is the number of {t}?
How many {t} are listed?
Give the number of the {t}.
Count of {t}: what does the list say?""",
    inventory_place="""Where are the {t}?
In what place are the {t} kept?
Where do I find the {t}?
Somebody is looking for the {t}. Where must he look?
Where does the list put the {t}?""",
    notice_date="""When is the {event} of {town}?
On which date does the {event} take place?
What is the date of the {event}?
On what day should I come to the {event} of {town}?
Which day was chosen for the {event}?""",
    notice_hall="""Where does the {event} take place?
In which building is the {event} of {town}?
What building is used for the {event}?
Where must one go for the {event}?
Which place was chosen for the {event}?""",
    notice_time="""At what time does it begin?
When does the {event} begin?
What is the starting hour?
By what time should one be there?
How early does the {event} start?""",
    notice_cost="""How much does it cost?
What must one pay?
What is the price of a ticket?
How much is it to get in?
What does the {event} cost?""",
    notice_bring="""What should everyone bring?
What must one bring along?
What are the guests asked to bring?
What should I not forget?
Which thing is one supposed to take along?""",
    notice_food="""What is there to eat?
What food will there be?
What do the guests eat?
What does one get to eat at the {event}?
Which dish is served?""",
    notice_forbidden="""Which animals are not admitted?
What animals must one leave at home?
Which animals are not allowed at the {event}?
What must not be brought along?
Which animals have to stay away?""",
    notice_rain="""Where is it if it rains?
Where does one go in case of rain?
What happens in bad weather: which building is used?
Which place is used when it rains?
It is raining. Where do I have to go?""",
    notice_who="""Who answers questions?
To whom should one turn with a question?
Whom can I ask about the {event}?
Who knows more about the {event}?
Who is to be asked?""",
    letter_date="""On what date was this written?
When was this written?
What is the date on it?
Which date does it carry?
When did the writer send these lines?""",
    letter_from="""Who wrote this?
Who is the writer?
From whom does it come?
Who sent these lines?
By whom was this written?""",
    chronicle_year="""When did this happen: {t}?
In which year do we read that {t}?
Which year belongs to this entry: {t}?
What is the year of the entry "{t}"?
Find the year in which {t}.""",
    chronicle_what="""What is said about the year {y}?
What happened in {y}?
Which event is listed for {y}?
What does the text tell of {y}?
What is the entry of {y}?""",
    log_when="""When was this noted: {e}?
At what time do we read "{e}"?
What time was it when this happened: {e}?
Give the time of this entry: {e}
At which time is it noted that {e}?""",
    log_what="""What happened at {t}?
What was noted at {t}?
What is the entry for {t}?
What does the log say about {t}?
Which event belongs to {t}?""",
    log_after="""What was noted next after "{e}"?
What is the entry after the one of {t}?
Which entry follows this one: {e}?
What happened directly after {t}?
After this, what came next: {e}?""",
    chain_where="""Where is the thing that belongs to {p}?
Where must {p} go to find what belongs to {p}?
{p} owns something. Where is it?
Where would one look for {p}'s property?
In what place is {p}'s thing?""",
    chain_who="""Who owns what is {w}?
To whom does the thing {w} belong?
Something is {w}. Whose is it?
Whose property is {w}?
Who is the owner of the thing {w}?""",
    chain_what="""What does {p} own?
Which thing belongs to {p}?
What is the thing that {p} has?
{p} owns something. What is it?
Of what is {p} the owner?""",
    chain_colour="""What colour is {p}'s thing?
What colour has the thing that belongs to {p}?
{p} owns something. Which colour is it?
Which colour belongs to {p}'s property?
In what colour is the thing of {p}?""",
    chain_by_colour="""Who owns the thing that is {c}?
To whom does the {c} thing belong?
Whose thing is {c}?
One thing is {c}. Who owns it?
Who is the owner of what is {c}?""",
    word_meaning="""What does "{w}" mean?
What is the meaning of {w}?
Translate "{w}".
Somebody says "{w}". What is meant?
How is {w} explained?""",
    word_for="""What is the word for {m}?
How does one say "{m}"?
Which word means {m}?
They have a word for {m}. Which one?
Translate {m} into this language.""",
    copy_begins="""Copy the line that begins with "{w}".
Repeat the line beginning with "{w}".
Which line starts with "{w}"? Repeat it.
Write down the line whose first word is "{w}".
Find the line that opens with "{w}" and copy it.""",
    copy_ends="""Copy the line that ends with "{w}".
Repeat the line ending with "{w}".
Which line has "{w}" as its last word? Repeat it.
Write down the line whose last word is "{w}".
Find the line that closes with "{w}" and copy it.""",
    copy_after="""Which line comes after this one: {x}
Repeat the line that follows "{x}".
What is the line below this one? {x}
Copy the line directly after "{x}".
After the line "{x}", what is the next?""",
    copy_first="""Repeat the first line.
Copy the first line.
What is the first line?
How does it begin? Give the whole first line.
Write down the line at the top.""",
    copy_last="""Repeat the last line.
Copy the last line.
What is the last line?
How does it end? Give the whole last line.
Write down the line at the bottom.""",
)
QUESTIONS["continue"] = """How does the sentence go on that begins "{begin}"?
Continue from the text: {begin}
Complete this sentence of the text: {begin} ...
What comes after "{begin}" in the text?
The text says "{begin}". How does it continue?
Finish the sentence as in the text: {begin}
Continue: {begin}
Go on word for word: "{begin}"
"{begin} ..." - give the rest of this sentence.
In the text, which words follow "{begin}"?"""

FACTS = dict(person=PERSON, place=PLACE, town=TOWN_FACTS, animal=ANIMAL_FACTS, thing=THING_FACTS, group=GROUP_FACTS,
             event=EVENT_FACTS)  # fmt: skip
LINES = dict(introduction=INTRODUCTIONS, merged=MERGED, place_introduction=PLACE_INTRODUCTIONS, wrong=WRONG, speech=SPEECH,
             about_person=ABOUT_PERSON, about_any=ABOUT_ANY, prose=PROSE, **QUESTIONS)  # fmt: skip

# ---- how entries of lists and other texts are written; both splits have them all ----

FORMS = dict(
    entry=[
        "{k}: {v}",
        "{k} = {v}",
        "- {k}: {v}",
        "* {k} -> {v}",
        "{k}\t{v}",
        '"{k}": "{v}",',
        "{k} ({v})",
        "{k} | {v}",
        "{k}, {v}",
        "{i}. {k} - {v}",
        "[{k}] {v}",
        "the {value} of {k} is {v}",
        "{k} has the {value} {v}",
    ],
    entries_head=[
        "List of the {value}s by {key}",
        "{key}: {value}",
        "Here is the {value} for each {key}.",
        "{Key} and {value}:",
        "The following list gives every {key} and its {value}.",
    ],
    row=[
        "For {k}, {rest}",
        "As to {k}, {rest}",
        "{k}: {rest}",
        "{k} stands in the list with {rest}",
        "{k} comes with {rest}",
    ],
    departure=[
        "{t} {what} to {to}, {place} {p}, arrives {a}",
        "{to}: departure {t}, {place} {p}, arrival {a}",
        "The {t} {what} goes to {to} from {place} {p} and arrives at {a}.",
        "{t} | {to} | {place} {p} | {a}",
        "At {t} the {what} to {to} leaves from {place} {p}; it is there at {a}.",
    ],
    ingredient=["- {a} of {t}", "{t}: {a}", "{a} of {t}", "* {t} ({a})"],
    stock=[
        "{t}: {c}, {p}",
        "{c} {t} ({p})",
        "{c} x {t} - {p}",
        "{p}: {c} {t}",
        "{W} there are {c} {t}.",
        "{T}, {c} of them, are kept {w}.",
        "There are {c} {t} {w}.",
    ],
    turn=["{s}: {t}", "- {s}: {t}", "[{s}] {t}", '{s}: "{t}"', '"{t}" said {s}.', '{s} said: "{t}"'],
    year=["{y}: {t}", "In {y} {u}", "({y}) {t}", "- {y} - {t}", "From the year {y} we read: {t}", "{y}. {t}"],
    entry_of_log=["[{t}] {e}", "{t} {e}", "{t} - {e}", "{t}: {e}.", "At {t} {e}."],
    owner=[
        "{p} owns the {t}",
        "the {t} belongs to {p}",
        "{p} is the owner of the {t}",
        "the {t} was given to {p}",
        "what {p} has bought is the {t}",
    ],
    lies=[
        "the {t} is {w}",
        "you will find the {t} {w}",
        "the {t} was left {w}",
        "{w} lies the {t}",
        "the {t} stands {w}",
    ],
    coloured=["the {t} is {c}", "{c} is the colour of the {t}", "somebody painted the {t} {c}"],
    meaning=[
        '"{w}" means "{m}"',
        "{w}: {m}",
        "{w} = {m}",
        "the word for {m} is {w}",
        "{m} is called {w}",
        "they say {w} when they mean {m}",
        "{w} stands for {m}",
    ],
)
GLOSSARY_HEADS = [
    "Some words in the language of {}:\n",
    "A short dictionary ({})\n",
    "",
    "In {} people have words of their own. ",
]
SUBJECT_LINES = ["News", "Hello", "About me", "A few lines", "Answer to your questions"]
SIGNED = ["Yours", "With best wishes", "Your old friend", "Yours sincerely", "Love"]
MEASURES = ["spoons", "cups", "handfuls", "pinches", "slices"]
GROUPS = ["{instrument} band", "{hobby} club", "guild of {pl job}", "society for {study}", "choir", "{garment} company"]
TOWN_BEFORE = ["Upper", "Lower", "Great", "Little", "Old", "Saint", "Port", "North", "West"]
BY = ["behind", "beside", "opposite", "near", "next to", "close to", "above"]
BY_BUILDING = [
    "behind",
    "beside",
    "opposite",
    "in the yard of",
    "on the roof of",
    "in front of",
    "at the back of",
    "in the cellar of",
]
TIMES = ["noon", "midnight", "dawn", "sunset", "daybreak", "dusk", "tea-time", "low tide", "high tide"]
BEFORE_HOUR = ["half past", "a quarter past", "a quarter to", "ten past"]
AGES = [
    *NUMBERS[7:],
    "twenty-two",
    "thirty-one",
    "thirty-six",
    "forty",
    "forty-five",
    "fifty-two",
    "sixty",
    "seventy-one",
]
YEARS = [str(y) for y in range(1683, 1990)]
COINS = "coins crowns pennies shillings dollars francs marks guilders".split()
