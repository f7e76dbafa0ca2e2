"""Synonyms of the real WordNet, through NLTK: its own data where they are installed, else those of Debian's package.

Debian's `wordnet-base` carries Princeton's WordNet 3.0, the version that NLTK downloads, but not the small file
`lexnames`, whose content its manual page lists, and the index of sense keys, which synonyms do not need. `MRA_TEST_WORDNET` names the package's folder where it
was unpacked elsewhere than in /usr/share/wordnet.
"""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mra.text import eda
from mra.text import wordnet as synonyms_module
from mra.text.wordnet import wordnet_synonyms

# lexnames(5WN): number, name and syntactic category of the lexicographer files.
CATEGORIES = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
LEXICOGRAPHER_FILES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
).split()


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """WordNet's data, where NLTK finds them."""
    import nltk

    folder = Path(os.environ.get("MRA_TEST_WORDNET", "/usr/share/wordnet"))
    before = list(nltk.data.path)
    try:
        nltk.data.find("corpora/wordnet.zip")
    except LookupError:
        if not (folder / "data.noun").is_file():
            pytest.skip("no WordNet: run  python -m nltk.downloader wordnet  or  apt-get install wordnet-base")
        root = tmp_path_factory.mktemp("nltk")
        corpus = root / "corpora" / "wordnet"
        corpus.mkdir(parents=True)
        for path in folder.iterdir():
            shutil.copyfile(path, corpus / path.name)  # NLTK refuses links that leave its folder
        lines = [
            f"{number:02d}\t{name}\t{CATEGORIES[name.split('.')[0]]}\n"
            for number, name in enumerate(LEXICOGRAPHER_FILES)
        ]
        (corpus / "lexnames").write_text("".join(lines), encoding="utf-8")
        # Look-up by sense key, which nothing here does; NLTK only wants to see the file.
        (corpus / "index.sense").touch()
        nltk.data.path.insert(0, str(root))
    wordnet_synonyms.cache_clear()
    synonyms_module.open_wordnet.cache_clear()
    yield
    nltk.data.path[:] = before
    wordnet_synonyms.cache_clear()
    synonyms_module.open_wordnet.cache_clear()


@pytest.mark.usefixtures("wordnet")
def test_synonyms_are_the_cleaned_lemmas_in_wordnets_order() -> None:
    assert wordnet_synonyms("backpack")[:4] == ("back pack", "knapsack", "packsack", "rucksack")
    assert "adult male" in wordnet_synonyms("man") and "man" not in wordnet_synonyms("man")
    assert wordnet_synonyms("wearing")  # inflected forms are found, too
    assert wordnet_synonyms("qwertz") == ()
    for word in ("man", "red", "coat", "t", "walking"):
        found = wordnet_synonyms(word)
        assert len(found) == len(set(found))
        assert all(set(synonym) <= set("abcdefghijklmnopqrstuvwxyz ") for synonym in found)


@pytest.mark.usefixtures("wordnet")
def test_captions_are_augmented_with_wordnet_reproducibly() -> None:
    sentence = "A man in a red coat is carrying a backpack."
    one, other = (eda(sentence, num_aug=20, rng=random.Random(4)) for _ in range(2))
    assert one == other and len(one) == 21
    assert any("knapsack" in text or "rucksack" in text or "back pack" in text or "ruby" in text for text in one[:-1])
