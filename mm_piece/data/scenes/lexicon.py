"""Words that the base learns to repeat, so that later tasks can ask for what no image showed."""

_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
_READABLE = """
ant bag bed box bus cap car cat cow cup dog egg fox hat ice jam key map owl pen pig sun tea van
"""
_TEXTURES = "striped dotted checked wavy ringed woven speckled crossed faded"
_COMMON = """
about above across action after again air all alone along also always among and animal another
any apple area arm around ask away baby back bad ball bank bar base basket beach bear beautiful
because been before begin behind being below best better between bicycle bird boat body book
both bottle bowl boy brand bread bridge bright bring brown brush building busy but button buy
cake call camera can care chair change chart child city clean clear clock close clothes cloud
coat coffee cold come common computer cook corner could country cover cross crowd cut dance dark
day dear deep desk did different dinner dirty dish door down draw dress drink drive drop dry
each ear early earth east eat edge empty end engine even evening ever every eye face fair fall
family far farm fast father feel few field fill find fine finger fire first fish flag flat floor
flower fly follow food foot forest fork form found fresh friend from front fruit full game
garden gate girl give glass gold good grass gray great grey ground group grow guitar hair half
hand hang happy hard have head hear heart heavy help her here high hill him hold hole home horse
hot hotel hour house how hundred idea image inside into iron jump just keep kind kitchen knife
know lady lake lamp land large last late laugh leaf learn leave leg less letter life lift light
like line lion list little live long look lost loud love low lunch machine made make man many
mark market may meat meet metal might milk mind mine minute mirror money month moon more morning
most mother motor mountain mouse mouth move much music must name near neck need never new next
nice night north nose not note now number ocean off office often old once only open order other
our out oven over own page paint pair paper park part past path pay people phone photo piano
picture piece pink pipe pizza place plain plane plant plate play please point pool poor pot
power pretty price pull push put quick quiet quite rain reach read ready real rest rice rich
ride river road rock roof room rose round row run safe said sail salt same sand save say school
sea seat second see sell send set shade shadow share sharp sheep shelf ship shirt shoe shop
short should show shut side silver simple sing sink sister sit skate sky sleep slow smile snow
soft some song soon sound soup south space spoon sport spring stand start station stay step
still stone stop store storm story street strong such sugar suit summer surf sweet swim table
tail take talk tall taste team teach tell tennis than thank that their them then there these
thick thin think this those through throw ticket time tired together toilet tomorrow tool tooth
touch toward tower town toy track traffic train travel tree truck true try turn type umbrella
under until upon use valley very video view visit voice wait walk wall want warm wash watch
water way wear weather week well were west wet wheel when while whole wide wild will wind window
wine winter wish with without woman wonder wood word work world worn would write wrong year
young your zebra
"""

NUMBERS = tuple(_NUMBERS.split())
READABLE = tuple(_READABLE.split())
TEXTURES = tuple(_TEXTURES.split())
COMMON = tuple(_COMMON.split())
EVERYTHING = (*NUMBERS, *READABLE, *TEXTURES, *COMMON)
