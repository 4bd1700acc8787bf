import pytest

from adafrugal.settings import compose
from adafrugal.system.errors import SettingError


def test_the_settings_are_those_of_train(composed):
    from adafrugal.settings.compose import check

    words = ["optimizer=frugal", "data=c4", "seed=3"]
    assert compose.settings(words) == check(*composed(*words))


@pytest.mark.parametrize(
    "words, message",
    [(["data=c5"], r"there is no 'c5'; allowed"), (["seed=x"], r"seed"), (["data.window_tokens=1"], r"1024")],
)
def test_a_wrong_setting_is_one_line(words, message):
    with pytest.raises(SettingError, match=message) as caught:
        compose.settings(words)
    assert "\n" not in str(caught.value)


def test_without_the_settings_files_it_says_where_they_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(compose, "REPOSITORY", tmp_path)
    with pytest.raises(SettingError, match=r"has no conf/config.yaml; `pip install -e .` in a clone"):
        compose.settings([])
