"""The FLOPs of whitening: by hand, and the table of docs/optimizer.md."""

import pytest
import torch
from conftest import REPOSITORY, script


@pytest.fixture(scope="module")
def whitening():
    return script("whitening")


def test_flops_of_a_matrix_are_those_of_its_products(whitening):
    products = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.matmul, torch.addmm):
                one, other = args[-2:]
                products.append(2 * one.shape[0] * one.shape[1] * other.shape[1])
            return func(*args, **(kwargs or {}))

    for shape in [(6, 10), (10, 6), (7, 7)]:
        products.clear()
        with Counted():
            whitening.Whiten(steps=3)(torch.randn(shape))
        assert sum(products) == whitening.flops(torch.Size(shape), steps=3)


def test_the_table_of_the_page_is_what_is_counted(whitening):
    assert whitening.table() in (REPOSITORY / "docs" / "optimizer.md").read_text()
