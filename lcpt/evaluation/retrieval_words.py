"""List the words that retrieval tasks plant: ordinary nouns, of which any one text holds few."""

KEYS = """
    acorn anchor anvil apron arrow badger barrel basin basket beacon beaver bishop blade blanket bonnet bottle bracelet
    brick bridge broom brush bucket bugle button cabin cactus camel candle cannon canoe carpet castle cattle cellar
    chapel cherub chimney clock cloak clown coach cobra comet compass copper corset cradle crane crayon crown curtain
    dagger desert diary dragon drawer eagle easel engine falcon ferry fiddle flute forge fossil fountain fox garden
    gate goose gospel grave guitar hammer harbor harp hatch hawk helmet heron hinge hornet hunter island jacket jockey
    jungle kettle kitten ladder lagoon lamb lance lantern lark ledger lemming leopard lizard locket lodge magnet
    magpie mantle marble market mason meadow medal melody mermaid mill mirror mitten monkey mosque moth mule museum
    napkin needle oasis orchard organ otter oven owl paddle palace panther parrot pebble pelican pendant piano pigeon
    pillow pirate piston planet plough pocket poet pond pony puppet puzzle quarry quiver rabbit raft raven ribbon rifle
    robin rocket rudder saddle sailor salmon sandal saucer shovel shrine sickle singer skull sledge slipper spade spider
    spoon squirrel stable statue stork sultan sword tailor tavern temple tiger torch tower trumpet tunnel turtle tutor
    valley vessel violin walrus wagon weaver weasel widow window wizard wolf zebra
""".split()

VALUES = """
    almond amber apple apricot aspen azure bacon bamboo banana barley basil beech beetle biscuit bramble brandy brass
    bronze broth burgundy butter cabbage canvas caramel cardamom carrot cedar celery chalk cheese cherry chestnut chive
    cider cinder cinnamon citron clover cobalt cocoa coffee coral cotton cream crimson crystal cumin currant cypress
    daisy damask denim diamond ebony elder emerald endive fennel fern fig flannel flax flint fudge garlic garnet gelatin
    ginger gold granite grape gravel hazel heather hemp hickory honey indigo iris iron ivory ivy jade jasmine jasper
    jelly juniper kelp lace larch lavender lead leather lemon lentil lilac lily lime linen maize mango maple maroon
    mauve melon millet mint moss muslin mustard myrtle nectar nettle nickel nutmeg nylon oak oatmeal ochre olive onion
    onyx opal orange orchid oyster pansy papaya paper parsley peach peanut pear pearl pepper pewter pine plaster plum
    poplar poppy porridge potato prune pumpkin purple quartz quince radish raisin resin rhubarb ribes rice rose ruby
    rum russet rye saffron sage salt sand sapphire satin scarlet sesame sherry silk silver slate sorrel spinach spruce
    steel straw sugar suede syrup tallow tansy teak thistle thyme timber tin toffee tomato topaz treacle tulip turnip
    turquoise vanilla velvet vinegar violet walnut wax wheat whiskey willow wine wool yarrow yeast zinc
""".split()
