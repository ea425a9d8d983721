"""Claims of notebooks/09_finding_a_bad_batch.py."""

# "All of them are at the same file", which is from the second delivery, after step 160.
assert (verdict.level, verdict.name) == ("WARN", "spikes")
assert len(report.events) >= 2
assert {event.batches for event in report.events} == {("part-35",)}
assert report.events[0].start > 160
assert report.events[0].first.key == "grad/norm"

# "All four matrices grew more than forty times, and the biases about three times."
matrices = np.array([leaf.endswith("/w") for leaf in leaves])
assert matrices.sum() == 4
assert raw[matrices].min() > 30
assert 1.5 < raw[~matrices].min() < raw[~matrices].max() < 5
assert (read("part-00")[0].max(), read("part-35")[0].max()) == (1, 16)

# "A second file shows up": its loss rises far more than the norm, and biases grow about as much as matrices.
assert {event.batches for event in events} == {("part-38",)}
assert events[0].first.key == "loss"
assert events[0].first.peak / events[0].first.usual > 20
assert shifted.max() < 20
assert 0.5 < np.median(shifted[~matrices]) / np.median(shifted[matrices]) < 1.5
assert not np.array_equal(read("part-38")[1], read("part-38", repaired=True)[1])

# "Or is it the learning rate?", and the rows of the table.
assert [finding.name for finding in fast_report if finding.level == "FAIL"] == ["diverged"]
assert not {"part-35", "part-38"} & {batch for event in fast_report.events for batch in event.batches}
without_two, _ = train("claims", watched(optax.sgd(0.2, momentum=0.9)), repaired=True, without=["part-35", "part-38"])
assert "diverged" in [finding.name for finding in clipjax.runs.diagnose(without_two)]
slow_events = [event for r in runs["a quarter of the rate"] for event in clipjax.runs.diagnose(r).events]
assert {"part-35"} <= {batch for event in slow_events for batch in event.batches}
assert all("diverged" not in [f.name for f in clipjax.runs.diagnose(r)] for r in runs["both files repaired"])

# "The first alert of that run."
assert alerts[0].steps[0] == report.events[0].start

# "What to do about it."
mean = {name: np.mean(values) for name, values in losses.items()}
clip = next(name for name in mean if name.startswith("clip"))
repaired = mean["both files repaired"]
assert mean["nothing"] > 3 * repaired
assert 1.5 * repaired < mean["a quarter of the rate"] < mean["nothing"]
assert all(mean[name] < 1.3 * repaired for name in (clip, "skip_steps", "both files left out"))
assert set(rejected) == {"part-35", "part-38"}
assert rejected.count("part-38") > 2 * rejected.count("part-35") > 0
