"""Common English nouns for keys and lists of words."""

_NOUNS = """
actor airport album anchor angel animal ankle apple apron arrow artist autumn badge bakery
balcony ballet bamboo banana barber bargain barrel basket battery beach beard beaver bedroom
beetle belt bench bicycle birthday biscuit blanket blossom border bottle bottom bowl bracelet
branch bread breakfast breeze brick bridge broom brother brush bubble bucket buffalo bullet
bundle butcher butter button cabbage cabin cable cactus camera camp canal candle candy cannon
canoe canvas captain caravan cargo carpet carrot castle cattle cave ceiling cellar cement chain
chair chalk channel chapel chart cheek cheese cherry chest chicken chimney chin circle circus
clay cliff clock cloth cloud clover coach coast cobra coconut coffee collar comet copper coral
corner cottage cotton couch cousin cradle crane crayon cricket crown crystal cupboard curtain
cushion dancer daughter dawn deer dentist desert desk diamond diary dinner dish doctor doll
dolphin donkey door dragon drawer dream dress driver drum duck dust eagle earring easel echo
elbow elephant elevator emerald engine envelope eraser evening fabric falcon farmer father
feather fence ferry festival fiddle field finger fireplace fisher flag flame flannel flour
flower flute forest fork fountain fox frame friend frog fruit funnel furnace galaxy gallery
garage garden garlic garment gate ghost giant ginger giraffe glacier glass glove glue goat goose
gorilla grape grass grave guitar gull hallway hammer hammock hamster handle harbor harp harvest
hat hawk helmet herb hermit heron highway hill hockey honey hood horn horse hospital hotel
hunter hut iceberg insect iron island ivory jacket jaguar jar jasmine jaw jelly jewel jockey
judge juice jungle kettle keyboard king kitchen kite kitten knee knife knight ladder lady lake
lamb lamp lantern laptop lawn lawyer leaf leather lemon leopard letter library lighthouse lily
lime lion lizard lobster locket lotus lumber lunch magnet mango maple marble market mask mayor
meadow medal melon merchant mermaid meteor mill mineral mirror monkey moon moss moth motor
mountain mouse mud muffin museum mushroom musician nail napkin neck necklace needle nephew nest
night noodle nurse oak oar ocean olive onion opera orange orchard orchid organ ostrich otter
oven owl oyster paddle painter palace panda paper parade parcel parent parrot passenger pastry
peach peacock peanut pearl pebble pencil penguin pepper piano picnic pigeon pillow pilot pine
pirate pistol planet plank plate pocket poem poet pond pony porch potato pottery prairie prince
printer prison pumpkin puppet puzzle pyramid queen quilt rabbit raccoon radio railway rain raven
razor ribbon rice rifle ring river robe robin rocket roof rope rose ruby rug saddle sailor salad
salmon sand sandal satin sauce scarf school scissors seal shadow shark sheep shelf shell
shepherd shield shirt shoe shore shovel shower shrimp silk silver singer sister skirt sky sleeve
slipper snail snake snow soap soldier soup spark sparrow spider spoon spring squirrel stable
stadium stairs statue steam steel stone storm stove straw street string student sugar suit
summer sunset swan sweater sword table tailor teacher teapot temple tent theater thread throat
throne thumb thunder ticket tiger timber tin toast tobacco tomato tooth torch tower toy tractor
train tray treasure truck trumpet tulip tunnel turkey turtle uncle valley vase velvet village
violin volcano waffle wagon waiter wallet walnut walrus warrior water wax weaver well whale
wheat wheel whistle widow willow window wine winter wizard wolf wool worm yacht yard zebra
"""

WORDS = tuple(_NOUNS.split())
