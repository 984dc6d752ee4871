from megatron_vlm.system.units import count_text, size_text, times_text


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


def test_numbers_of_things() -> None:
    counts = [(1, "sample"), (1200, "sample"), (2, "process"), (2, "pass"), (2, "copy"), (0, "run")]
    told = ["1 sample", "1,200 samples", "2 processes", "2 passes", "2 copies", "0 runs"]
    assert [count_text(*count) for count in counts] == told
    assert [times_text(number) for number in (1, 2, 3)] == ["once", "twice", "3 times"]
