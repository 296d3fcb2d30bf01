import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.overlay import lay_over

RATE, WIDER, MOMENTUM, SERVER = (
    {"log_uniform": [1e-4, 1.0]},
    {"log_uniform": [1e-6, 1.0]},
    {"uniform": [0.0, 0.9]},
    {"choice": [0.1, 1.0]},
)
SHIPPED = {
    "client": {"rate": 0.1, "momentum": 0.0},  # the values of a data set fix nothing
    "space": {"client": {"rate": RATE, "momentum": MOMENTUM}, "server": {"rate": SERVER}},
}


def searched(shipped, **given):
    """The domains of what is searched, by dotted names."""
    space = lay_over(shipped, given)
    return {f"{part}.{name}": d for part, table in space.items() for name, d in table.items() if d != "fixed"}


ALL = {"client.rate": RATE, "client.momentum": MOMENTUM, "server.rate": SERVER}


def without(*names):
    return {name: domain for name, domain in ALL.items() if name not in names}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ALL),
        ({"space": {"client": {"rate": WIDER}}}, {**ALL, "client.rate": WIDER}),
        ({"space": {"client": {"warmth": MOMENTUM}}}, {**ALL, "client.warmth": MOMENTUM}),
        ({"space": {"client": {"rate": "fixed"}}}, without("client.rate")),
        ({"client": {"rate": 0.5}}, without("client.rate")),
        ({"server": {"rate": 0.5, "tau": 1.0}}, without("server.rate")),
        ({"client": {"rate": 0.5}, "space": {"client": {"rate": WIDER}}}, {**ALL, "client.rate": WIDER}),
        ({"client": {"rate": 0.5}, "space": {"client": {"rate": "fixed"}}}, without("client.rate")),
        ({"space": {"only": ["client.rate"]}}, {"client.rate": RATE}),
        ({"space": {"only": ["server.rate"], "client": {"rate": WIDER}}}, {"server.rate": SERVER}),
        ({"space": {"only": ["client.rate"], "client": {"rate": WIDER}}}, {"client.rate": WIDER}),
        ({"space": {"only": ["client.rate"]}, "client": {"rate": 0.5, "momentum": 0.5}}, {"client.rate": RATE}),
        ({"space": {"only": []}}, {}),
    ],
)
def test_the_users_tables_are_laid_over_what_is_shipped(given, wanted):
    assert searched(SHIPPED, **given) == wanted
    # Laid over nothing, as the settings of a run are, the result means the same again.
    assert searched({}, **{**given, "space": lay_over(SHIPPED, given)}) == wanted


def test_what_is_not_searched_has_the_word():
    space = lay_over(SHIPPED, {"client": {"rate": 0.5}})
    assert space == {"client": {"rate": "fixed", "momentum": MOMENTUM}, "server": {"rate": SERVER}}


def test_only_names_dimensions():
    with pytest.raises(UnknownNameError, match=r"^unknown dimension in space.only 'client.rat'; known: client.mom"):
        lay_over(SHIPPED, {"space": {"only": ["client.rate", "client.rat"]}})
    contradiction = {"only": ["client.rate"], "client": {"rate": "fixed"}}
    with pytest.raises(InputError) as raised:
        lay_over(SHIPPED, {"space": contradiction})
    said = "space.only must name what is searched, got 'client.rate', and space.client.rate = \"fixed\""
    assert str(raised.value) == said
