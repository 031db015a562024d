//! `--verify` finds a wrong frame, and none where there is none.

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::harness::{Outcome, PASSED, Test};
use crate::modules::Witness;
use crate::process::{State, dmaflow, finish, number, pipe};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "verify::a_changed_byte_in_fifo", needs: NEEDS, seconds: 120, run: a_changed_byte_in_fifo },
    Test { name: "verify::a_changed_byte_in_mailbox", needs: NEEDS, seconds: 120, run: a_changed_byte_in_mailbox },
    Test {
        name: "verify::the_first_and_the_last_frame",
        needs: NEEDS,
        seconds: 120,
        run: the_first_and_the_last_frame,
    },
    Test { name: "verify::nothing_wrong_in_mailbox", needs: NEEDS, seconds: 120, run: nothing_wrong_in_mailbox },
    Test { name: "verify::every_format_notices", needs: NEEDS, seconds: 300, run: every_format_notices },
    Test {
        name: "verify::only_displays_can_be_verified",
        needs: NEEDS,
        seconds: 60,
        run: only_displays_can_be_verified,
    },
];

/// Frame `place` is changed: status 4, and result and stderr name that frame.
fn finds(options: &str, place: u64) -> Result<Value> {
    let witness = Witness::new()?;
    let before = State::read();
    let run = finish(&mut pipe(&format!("{options} --verify --corrupt-frame {place}")))?;
    let result = run.json(4)?;
    ensure!(number(&result, "verify/wrong")? == 1, "{result}");
    let first = number(&result, "verify/first_wrong/frame")?;
    ensure!(first == place, "frame {first} is said to be wrong, and {place} is: {result}");
    run.one_line(4, &[&format!("frame {place} "), "wrong"])?;
    before.is_back()?;
    drop(witness);
    Ok(result)
}

fn a_changed_byte_in_fifo() -> anyhow::Result<Outcome> {
    let result = finds("--format XR24 --size 640x360 --frames 12", 7)?;
    ensure!(number(&result, "verify/checked")? == 12, "{result}");
    PASSED
}

/// In mailbox a frame may be dropped before it is shown, the changed one too. Slower than the display's refresh none is.
fn a_changed_byte_in_mailbox() -> anyhow::Result<Outcome> {
    let result = finds("--format XR24 --size 640x360 --fps 2 --frames 9 --present mailbox", 7)?;
    ensure!(number(&result, "frames/dropped_by_display")? == 0, "{result}");
    PASSED
}

fn the_first_and_the_last_frame() -> anyhow::Result<Outcome> {
    // A frame that never came was not changed, and nothing was tested.
    let run = finish(&mut pipe("--format XR24 --size 640x360 --frames 3 --verify --corrupt-frame 3"))?;
    run.one_line(1, &["frame 3 was not changed", "3 came"])?;
    for place in [0, 4] {
        finds("--format XR24 --size 640x360 --frames 5", place)?;
    }
    PASSED
}

/// While vkms composes, frames come faster than they can be shown: those shown must be right all the same.
fn nothing_wrong_in_mailbox() -> anyhow::Result<Outcome> {
    let result =
        finish(&mut pipe("--format XR24 --size 640x360 --fps 60 --frames 40 --present mailbox --verify"))?.json(0)?;
    let [captured, presented, dropped] =
        ["frames/captured", "frames/presented", "frames/dropped_by_display"].map(|path| number(&result, path));
    let (captured, presented, dropped) = (captured?, presented?, dropped?);
    ensure!(captured == 40 && presented + dropped == captured && presented > 0, "{result}");
    ensure!(number(&result, "verify/checked")? == presented && number(&result, "verify/wrong")? == 0, "{result}");
    PASSED
}

/// A prediction that ignored a format's pixels would never fail.
fn every_format_notices() -> anyhow::Result<Outcome> {
    let list = finish(&mut dmaflow("list --json"))?.json(0)?;
    let pairs = list["shared"].as_array().cloned().unwrap_or_default();
    let shared = pairs
        .iter()
        .find_map(|pair| pair["formats"].as_array())
        .cloned()
        .unwrap_or_default();
    ensure!(!shared.is_empty(), "vivid and vkms share no format: {list}");
    for format in shared.iter().filter_map(Value::as_str) {
        let size = "320x180";
        finds(&format!("--format {format} --size {size} --frames 3"), 1)?;
    }
    PASSED
}

fn only_displays_can_be_verified() -> anyhow::Result<Outcome> {
    for options in ["--to null --verify", "--to png:/tmp/never.png --verify", "--to vkms --corrupt-frame 3"] {
        let run = finish(&mut dmaflow(&format!("pipe --from vivid {options} --frames 1 --json")))?;
        run.has_status(2)?;
        ensure!(run.stdout.is_empty(), "{options}: {}", run.stdout);
    }
    ensure!(!std::path::Path::new("/tmp/never.png").exists(), "a picture came of a wrong usage");
    PASSED
}
