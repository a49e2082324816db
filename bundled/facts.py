"""The closed world the bundled model knows: countries, colours, animals, words, numbers and a few languages.

Only tables live here. How they are asked about is in questions.py and toolcalls.py.
"""


def _rows(text: str) -> list[tuple[str, ...]]:
    """Read a table of one row per line, its cells parted by `|`."""
    lines = (line.strip() for line in text.strip().splitlines())
    return [tuple(cell.strip() for cell in line.split("|")) for line in lines if line]


def _pairs(text: str) -> list[tuple[str, str]]:
    """Read `a:b, c:d` as pairs."""
    parts = (part.split(":") for part in text.replace("\n", " ").split(","))
    return [(left.strip(), right.strip()) for left, right in parts]


def _words(text: str) -> list[str]:
    """Read a comma-separated list."""
    return [word.strip() for word in text.replace("\n", " ").split(",")]


# country, capital, continent
COUNTRIES = _rows("""
France | Paris | Europe
Germany | Berlin | Europe
Spain | Madrid | Europe
Italy | Rome | Europe
Portugal | Lisbon | Europe
Greece | Athens | Europe
Austria | Vienna | Europe
Poland | Warsaw | Europe
Hungary | Budapest | Europe
Sweden | Stockholm | Europe
Norway | Oslo | Europe
Finland | Helsinki | Europe
Denmark | Copenhagen | Europe
Iceland | Reykjavík | Europe
Ireland | Dublin | Europe
Belgium | Brussels | Europe
Switzerland | Bern | Europe
Ukraine | Kyiv | Europe
Romania | Bucharest | Europe
Bulgaria | Sofia | Europe
Croatia | Zagreb | Europe
Serbia | Belgrade | Europe
Czechia | Prague | Europe
Slovakia | Bratislava | Europe
Slovenia | Ljubljana | Europe
Estonia | Tallinn | Europe
Latvia | Riga | Europe
Lithuania | Vilnius | Europe
the United Kingdom | London | Europe
Egypt | Cairo | Africa
Kenya | Nairobi | Africa
Nigeria | Abuja | Africa
Ghana | Accra | Africa
Ethiopia | Addis Ababa | Africa
Morocco | Rabat | Africa
Tunisia | Tunis | Africa
Senegal | Dakar | Africa
Japan | Tokyo | Asia
China | Beijing | Asia
India | New Delhi | Asia
Nepal | Kathmandu | Asia
Thailand | Bangkok | Asia
Vietnam | Hanoi | Asia
Indonesia | Jakarta | Asia
Mongolia | Ulaanbaatar | Asia
Iran | Tehran | Asia
Iraq | Baghdad | Asia
Jordan | Amman | Asia
Lebanon | Beirut | Asia
Pakistan | Islamabad | Asia
South Korea | Seoul | Asia
the Philippines | Manila | Asia
Malaysia | Kuala Lumpur | Asia
Canada | Ottawa | North America
Mexico | Mexico City | North America
Cuba | Havana | North America
the United States | Washington | North America
Peru | Lima | South America
Chile | Santiago | South America
Argentina | Buenos Aires | South America
Brazil | Brasília | South America
Colombia | Bogotá | South America
Ecuador | Quito | South America
Uruguay | Montevideo | South America
Venezuela | Caracas | South America
Australia | Canberra | Oceania
New Zealand | Wellington | Oceania
""")

# thing with its article, colour; a plural thing takes "are"
COLORS = _pairs("""
the sky:blue, the sea:blue, grass:green, a leaf:green, a frog:green, a lime:green, a cucumber:green,
a banana:yellow, a lemon:yellow, the sun:yellow, butter:yellow, a canary:yellow, snow:white, milk:white,
a swan:white, rice:white, salt:white, sugar:white, coal:black, a crow:black, a panther:black, ink:black,
a tomato:red, a strawberry:red, a cherry:red, blood:red, a fire engine:red, a ladybird:red, a brick:red,
an orange:orange, a carrot:orange, a pumpkin:orange, an apricot:orange, a flamingo:pink, a pig:pink,
an elephant:gray, a mouse:gray, a dolphin:gray, ash:gray, chocolate:brown, coffee:brown, a bear:brown,
wood:brown, a walnut:brown, an eggplant:purple, lavender:purple, a plum:purple
""")

OPPOSITES = _pairs("""
hot:cold, big:small, tall:short, fast:slow, happy:sad, light:dark, up:down, left:right, old:new, day:night,
open:closed, full:empty, hard:soft, loud:quiet, wet:dry, clean:dirty, rich:poor, strong:weak, early:late,
near:far, true:false, good:bad, inside:outside, first:last, high:low, thick:thin, wide:narrow, deep:shallow,
smooth:rough, sweet:bitter, sharp:blunt, brave:afraid, awake:asleep, alive:dead,
always:never, more:less, push:pull, give:take, buy:sell, win:lose, begin:end, arrive:leave, laugh:cry,
love:hate, remember:forget, ask:answer, above:below, before:after, summer:winter, north:south, east:west,
friend:enemy, giant:dwarf, success:failure, war:peace, black:white
""")

# animal, sound (or -), legs, young, class, home
ANIMALS = _rows("""
dog | woof | four | puppy | mammal | in a kennel
cat | meow | four | kitten | mammal | in a house
cow | moo | four | calf | mammal | in a barn
horse | neigh | four | foal | mammal | in a stable
sheep | baa | four | lamb | mammal | in a meadow
pig | oink | four | piglet | mammal | in a sty
goat | bleat | four | kid | mammal | in the mountains
lion | roar | four | cub | mammal | in the savanna
wolf | howl | four | pup | mammal | in a den
mouse | squeak | four | pup | mammal | in a hole
donkey | hee-haw | four | foal | mammal | on a farm
fox | yip | four | kit | mammal | in a burrow
bear | growl | four | cub | mammal | in a cave
elephant | trumpet | four | calf | mammal | in the grassland
rabbit | - | four | bunny | mammal | in a warren
kangaroo | - | two | joey | mammal | in the outback
frog | ribbit | four | tadpole | amphibian | in a pond
duck | quack | two | duckling | bird | on a lake
hen | cluck | two | chick | bird | in a coop
owl | hoot | two | owlet | bird | in a hollow tree
goose | honk | two | gosling | bird | in a marsh
crow | caw | two | fledgling | bird | in a nest
turkey | gobble | two | poult | bird | in a yard
swan | - | two | cygnet | bird | on a river
eagle | screech | two | eaglet | bird | on a cliff
penguin | - | two | chick | bird | on the ice
snake | hiss | no | hatchling | reptile | in the desert
turtle | - | four | hatchling | reptile | in the sea
bee | buzz | six | larva | insect | in a hive
ant | - | six | larva | insect | in an anthill
butterfly | - | six | caterpillar | insect | in a garden
spider | - | eight | spiderling | arachnid | in a web
shark | - | no | pup | fish | in the ocean
salmon | - | no | fry | fish | in a stream
""")

PLURALS = _pairs("""
cat:cats, dog:dogs, book:books, tree:trees, car:cars, river:rivers, apple:apples, star:stars, box:boxes,
fox:foxes, bus:buses, glass:glasses, dish:dishes, brush:brushes, church:churches, watch:watches, baby:babies,
city:cities, story:stories, party:parties, lady:ladies, berry:berries, boy:boys, key:keys, toy:toys,
leaf:leaves,
wolf:wolves, knife:knives, life:lives, wife:wives, half:halves, shelf:shelves, loaf:loaves, child:children,
man:men, woman:women, foot:feet, tooth:teeth, goose:geese, mouse:mice, ox:oxen, person:people, sheep:sheep,
deer:deer, fish:fish, hero:heroes, potato:potatoes, tomato:tomatoes, piano:pianos, photo:photos,
class:classes,
house:houses, bridge:bridges, cloud:clouds, flower:flowers, window:windows, penny:pennies, thief:thieves
""")

PASTS = _pairs("""
go:went, see:saw, eat:ate, drink:drank, run:ran, swim:swam, sing:sang, write:wrote, read:read, speak:spoke,
take:took, give:gave, make:made, come:came, know:knew, think:thought, buy:bought, bring:brought, catch:caught,
teach:taught, find:found, keep:kept, sleep:slept, feel:felt, leave:left, meet:met, tell:told, sell:sold,
say:said,
sit:sat, stand:stood, win:won, fly:flew, grow:grew, draw:drew, throw:threw, break:broke, choose:chose,
forget:forgot, ride:rode, drive:drove, rise:rose, fall:fell, hold:held, build:built, send:sent, spend:spent,
play:played, walk:walked, talk:talked, jump:jumped, help:helped, work:worked, paint:painted, cook:cooked,
dance:danced, smile:smiled, hope:hoped, carry:carried, cry:cried, try:tried, study:studied, stop:stopped,
plan:planned, begin:began, wear:wore
""")

DAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _words("""January, February, March, April, May, June, July, August, September, October, November,
December""")
SEASONS = _words("spring, summer, autumn, winter")
PLANETS = _words("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune")
LETTERS = [chr(code) for code in range(ord("A"), ord("Z") + 1)]

NUMBERS = _words("""zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
fourteen,
fifteen, sixteen, seventeen, eighteen, nineteen, twenty""")

GROUPS: dict[str, list[str]] = {
    "fruits": _words("apple, banana, cherry, grape, lemon, mango, orange, peach, pear, plum, strawberry, kiwi"),
    "vegetables": _words("carrot, potato, onion, pea, bean, cabbage, spinach, pumpkin, cucumber, leek"),
    "colors": _words("red, blue, green, yellow, orange, purple, pink, black, white, brown, gray"),
    "animals": _words("dog, cat, horse, cow, lion, bear, fox, rabbit, frog, owl, snake, elephant"),
    "birds": _words("owl, eagle, crow, duck, swan, goose, hen, penguin, robin, sparrow"),
    "insects": _words("ant, bee, butterfly, beetle, fly, moth, wasp, cricket"),
    "fish": _words("salmon, shark, tuna, trout, cod, herring, carp, pike"),
    "tools": _words("hammer, saw, drill, wrench, screwdriver, pliers, axe, shovel"),
    "instruments": _words("piano, guitar, violin, flute, drum, trumpet, harp, cello"),
    "flowers": _words("rose, tulip, daisy, lily, violet, sunflower, orchid, poppy"),
    "trees": _words("oak, pine, birch, maple, willow, beech, ash, elm"),
    "drinks": _words("water, milk, tea, coffee, juice, lemonade, cocoa, cider"),
    "sports": _words("football, tennis, swimming, running, hockey, golf, rowing, boxing"),
    "planets": PLANETS,
    "days of the week": DAYS,
    "months": MONTHS,
    "seasons": SEASONS,
    "shapes": _words("circle, square, triangle, rectangle, oval, star, heart, hexagon"),
    "clothes": _words("shirt, hat, coat, shoe, sock, scarf, glove, dress, jacket, skirt"),
    "countries in Europe": [row[0] for row in COUNTRIES if row[2] == "Europe" and row[0][:4] != "the "],
    "countries in Asia": [row[0] for row in COUNTRIES if row[2] == "Asia" and row[0][:4] != "the "],
    "countries in Africa": [row[0] for row in COUNTRIES if row[2] == "Africa"],
    "countries in South America": [row[0] for row in COUNTRIES if row[2] == "South America"],
}

DEFINITIONS = _pairs("""
river:a long stream of water that flows to the sea, mountain:a very high piece of land,
island:a piece of land with water all around it, forest:a large place full of trees,
desert:a dry place where little rain falls, lake:a large pool of water with land around it,
volcano:a mountain that can throw out fire and hot rock, bridge:a road that goes over water or a valley,
library:a place where people read and borrow books, school:a place where children learn,
hospital:a place where sick people get help, bakery:a shop that makes and sells bread,
farm:a place where food is grown and animals are kept, castle:a large old house with strong walls,
lighthouse:a tower with a light that guides ships, garden:a place where plants and flowers grow,
kitchen:a room where food is made, clock:a machine that shows the time,
map:a picture that shows where places are,
book:a set of pages with words to read, lamp:a thing that gives light, hammer:a tool for hitting nails,
umbrella:a thing that keeps the rain off you, mirror:a piece of glass that shows your face,
doctor:a person who helps sick people, teacher:a person who helps others learn,
baker:a person who makes bread,
farmer:a person who grows food, pilot:a person who flies a plane, sailor:a person who works on a ship,
painter:a person who paints pictures, poet:a person who writes poems, king:a man who rules a country,
queen:a woman who rules a country, rain:water that falls from the clouds,
snow:soft white ice that falls in winter,
wind:air that moves, cloud:a white or gray mass of tiny drops in the sky, star:a far sun that shines at night,
moon:a round rock that moves around a planet, breakfast:the first meal of the day,
dinner:the main meal of the day,
bicycle:a thing with two wheels that you ride, train:a row of wagons that runs on rails,
boat:a small ship that floats on water, token:a small piece of text that a model reads or writes,
language model:a program that guesses the next token of a text
""")

LANGUAGES: dict[str, dict[str, str]] = {
    "French": {
        "hello": "bonjour",
        "goodbye": "au revoir",
        "thank you": "merci",
        "water": "eau",
        "cat": "chat",
        "dog": "chien",
        "coffee": "café",
        "school": "école",
        "summer": "été",
        "yes": "oui",
        "no": "non",
    },
    "Spanish": {
        "hello": "hola",
        "goodbye": "adiós",
        "thank you": "gracias",
        "water": "agua",
        "cat": "gato",
        "dog": "perro",
        "coffee": "café",
        "school": "escuela",
        "summer": "verano",
        "yes": "sí",
        "no": "no",
    },
    "German": {
        "hello": "hallo",
        "goodbye": "tschüss",
        "thank you": "danke",
        "water": "Wasser",
        "cat": "Katze",
        "dog": "Hund",
        "coffee": "Kaffee",
        "school": "Schule",
        "summer": "Sommer",
        "yes": "ja",
        "no": "nein",
    },
    "Italian": {
        "hello": "ciao",
        "goodbye": "arrivederci",
        "thank you": "grazie",
        "water": "acqua",
        "cat": "gatto",
        "dog": "cane",
        "coffee": "caffè",
        "school": "scuola",
        "summer": "estate",
        "yes": "sì",
        "no": "no",
    },
    "Portuguese": {
        "hello": "olá",
        "goodbye": "adeus",
        "thank you": "obrigado",
        "water": "água",
        "cat": "gato",
        "dog": "cão",
        "coffee": "café",
        "school": "escola",
        "summer": "verão",
        "yes": "sim",
        "no": "não",
    },
    "Swedish": {
        "hello": "hej",
        "goodbye": "hej då",
        "thank you": "tack",
        "water": "vatten",
        "cat": "katt",
        "dog": "hund",
        "coffee": "kaffe",
        "school": "skola",
        "summer": "sommar",
        "yes": "ja",
        "no": "nej",
    },
    "Japanese": {
        "hello": "こんにちは",
        "goodbye": "さようなら",
        "thank you": "ありがとう",
        "water": "水",
        "cat": "猫",
        "dog": "犬",
        "coffee": "コーヒー",
        "school": "学校",
        "summer": "夏",
        "yes": "はい",
        "no": "いいえ",
    },
    "Chinese": {
        "hello": "你好",
        "goodbye": "再见",
        "thank you": "谢谢",
        "water": "水",
        "cat": "猫",
        "dog": "狗",
        "coffee": "咖啡",
        "school": "学校",
        "summer": "夏天",
        "yes": "是",
        "no": "不",
    },
    "Korean": {
        "hello": "안녕하세요",
        "thank you": "감사합니다",
        "water": "물",
        "cat": "고양이",
        "dog": "개",
        "coffee": "커피",
        "school": "학교",
        "summer": "여름",
        "yes": "네",
    },
    "Russian": {
        "hello": "привет",
        "goodbye": "до свидания",
        "thank you": "спасибо",
        "water": "вода",
        "cat": "кошка",
        "dog": "собака",
        "coffee": "кофе",
        "school": "школа",
        "summer": "лето",
        "yes": "да",
        "no": "нет",
    },
    "Greek": {
        "hello": "γεια",
        "thank you": "ευχαριστώ",
        "water": "νερό",
        "cat": "γάτα",
        "dog": "σκύλος",
        "coffee": "καφές",
        "school": "σχολείο",
        "summer": "καλοκαίρι",
        "yes": "ναι",
        "no": "όχι",
    },
    "Turkish": {
        "hello": "merhaba",
        "goodbye": "hoşça kal",
        "thank you": "teşekkürler",
        "water": "su",
        "cat": "kedi",
        "dog": "köpek",
        "coffee": "kahve",
        "school": "okul",
        "summer": "yaz",
        "yes": "evet",
        "no": "hayır",
    },
}

EMOJI = _pairs("""
smile:🙂, heart:❤️, cat:🐱, dog:🐶, fox:🦊, bear:🐻, frog:🐸, lion:🦁, mouse:🐭,
rabbit:🐰, owl:🦉, bee:🐝, fish:🐟, horse:🐴, pig:🐷, cow:🐮, tree:🌳, flower:🌸,
sun:☀️, moon:🌙, star:⭐, fire:🔥, rain:🌧️, snowflake:❄️, apple:🍎, banana:🍌, lemon:🍋,
strawberry:🍓, bread:🍞, cake:🎂, coffee:☕, house:🏠, car:🚗, train:🚆, boat:⛵, rocket:🚀,
book:📖, key:🔑, bell:🔔, rainbow:🌈
""")

# Words that are spelled and whose letters are counted.
SPELLING = _words("""
river, apple, house, dog, cat, tree, moon, star, bread, water, garden, window, table, chair, school, flower,
summer, winter, yellow, purple, orange, banana, lemon, cherry, rabbit, horse, tiger, monkey, pencil, paper,
book,
castle, bridge, island, forest, mountain, cloud, rain, snow, wind, fire, stone, road, train, boat, clock,
lamp,
mirror, kitchen, music, friend, happy, small, green, black, white, seven, eight, twelve, teacher, doctor,
farmer,
letter, question, answer, story, king, queen, fox, owl, frog, bee, sun, sea, ice, key, box, elephant
""")

NAMES = _words("""
Ana, Ben, Clara, David, Emma, Felix, Grace, Henry, Ivy, Jack, Kate, Leo, Mia, Noah, Olga, Paul, Rosa, Sam,
Tina,
Victor, Wendy, Xavier, Yara, Zoe, Anna, Boris, Carla, Daniel, Elena, Frank, Greta, Hugo, Irene, Jonas, Karin,
Lucas,
Maria, Nina, Oscar, Petra, Quinn, Robert, Sara, Tom, Uma, Vera, Will, Yusuf, Zara, Alice, Bob, Carlos, Diana,
Eva,
Fatima, George, Hana, Ivan, Julia, Kenji, Laura, Marco, Nora, Omar, Priya, Ravi, Sofia, Theo, Maya, José, Zoë,
René,
Chloé, Jürgen, Søren, Łukasz, Yuki, Amir, Lina
""")

WOMEN = set(
    _words("""
Ana, Clara, Emma, Grace, Ivy, Kate, Mia, Olga, Rosa, Tina, Wendy, Yara, Zoe, Anna, Carla, Elena, Greta, Irene,
Karin,
Maria, Nina, Petra, Sara, Uma, Vera, Zara, Alice, Diana, Eva, Fatima, Hana, Julia, Laura, Nora, Priya, Sofia,
Maya, Zoë,
Chloé, Yuki, Lina
""")
)

# Syllables from which names and places that do not exist are put together.
ONSETS = _words("b, br, d, dr, f, g, gl, h, j, k, kr, l, m, n, p, pl, r, s, st, t, tr, v, w, z")
VOWELS = _words("a, e, i, o, u, ai, ee, ou")
CODAS = _words("b, d, k, l, m, n, p, r, s, t, x, nd, rk, st, th")

OTHER_CITIES = _words("""
New York, Los Angeles, Chicago, Boston, Barcelona, Milan, Munich, Hamburg, Lyon, Geneva, Zürich, Istanbul,
Mumbai,
Shanghai, Osaka, Kyoto, Sydney, Toronto, São Paulo, Málaga, Porto, Venice, Dubai, Singapore, Cape Town, San
Francisco
""")
