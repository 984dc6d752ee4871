from megatron_vlm.config.units import size_text


def test_no_size_reads_as_nothing() -> None:
    texts = {
        3 * 2**30: "3.0 GiB",
        1536 * 2**30: "1,536.0 GiB",
        2**21: "2.0 MiB",
        2**17: "0.1 MiB",
        10_000: "9.8 KiB",
        100: "0.1 KiB",
        0: "0.0 KiB",
    }
    assert {size: size_text(size) for size in texts} == texts
