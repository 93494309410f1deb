"""Ids in settings: found wherever they stand, and put in their new places."""

from __future__ import annotations

from featherweight.checkpoint.token_ids import token_ids, with_places

SETTINGS = {
    "bos_token_id": 1,
    "eos_token_id": [2, 9],
    "pad_token_id": -1,
    "forced_bos_token_id": None,
    "hidden_size": 9,
    "suppress_tokens": [5, 7],
    "bad_words_ids": [[5], [7, 9]],
    "forced_decoder_ids": [[1, 9], [2, None]],
    "sequence_bias": [[[5, 7], -10.0], [[9], 1.5]],
    "decoder": {"decoder_start_token_id": 9},
    "added_tokens_decoder": {"9": {"content": "<s>"}},
}


def test_ids_are_found_at_whatever_depth_but_not_those_of_bans() -> None:
    assert set(token_ids(SETTINGS)) == {1, 2, 9}


def test_each_id_moves_and_what_bans_a_lost_token_is_left_out() -> None:
    assert with_places(SETTINGS, {1: 0, 2: 1, 7: 2, 9: 3}) == {
        "bos_token_id": 0,
        "eos_token_id": [1, 3],
        "pad_token_id": -1,
        "forced_bos_token_id": None,
        "hidden_size": 9,
        "suppress_tokens": [2],
        "bad_words_ids": [[2, 3]],
        "forced_decoder_ids": [[1, 3], [2, None]],
        "sequence_bias": [[[3], 1.5]],
        "decoder": {"decoder_start_token_id": 3},
        "added_tokens_decoder": {"3": {"content": "<s>"}},
    }
