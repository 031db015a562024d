//! The ladder: the first rung that holds, why those above it do not, and every copy accounted for.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::capture::Shattered;
use crate::formats::shown_of_captured;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{Witness, kernel, vivid};
use crate::process::{State, finish, number, pipe};

const NEEDS: &[&str] = &["vivid", "vkms"];
/// How many make buffers for a display that does not render: itself, a heap and udmabuf.
pub const MAKERS: usize = 3;

pub const TESTS: &[Test] = &[
    Test { name: "ladder::yuyv_is_copied", needs: NEEDS, seconds: 900, run: yuyv_is_copied },
    Test { name: "ladder::nv12_where_it_can", needs: NEEDS, seconds: 300, run: nv12_where_it_can },
    Test { name: "ladder::every_format_that_is_converted", needs: NEEDS, seconds: 900, run: every_format },
    Test { name: "ladder::strides_by_the_displays_memory", needs: NEEDS, seconds: 120, run: strides },
    Test { name: "ladder::a_device_that_needs_contiguous_memory", needs: NEEDS, seconds: 120, run: contiguous },
    Test { name: "ladder::a_copy_on_demand", needs: NEEDS, seconds: 120, run: a_copy_on_demand },
    Test { name: "ladder::a_wrong_copy_is_found", needs: NEEDS, seconds: 120, run: a_wrong_copy },
];

pub fn text<'a>(value: &'a Value, what: &str) -> Result<&'a str> {
    value[what].as_str().with_context(|| format!("no {what} in {value}"))
}

/// The refusal of a rung; each has a step, a reason and a repair.
fn refusal<'a>(result: &'a Value, rung: &str) -> Result<&'a Value> {
    let all = result["refusals"].as_array().context("refusals")?;
    for refusal in all {
        for what in ["step", "why", "repair"] {
            ensure!(!text(refusal, what)?.is_empty(), "no {what} in {refusal}");
        }
    }
    all.iter()
        .find(|refusal| refusal["rung"] == rung)
        .with_context(|| format!("no refusal of {rung} in {result}"))
}

/// A run in which each frame is copied once, converted to 4 bytes a pixel.
fn converted_once(result: &Value, frames: u64, (width, height): (u64, u64)) -> Result<()> {
    ensure!(result["path"] == "copied", "the path is {}", result["path"]);
    let copies = result["copies"].as_array().context("copies")?;
    ensure!(copies.len() == 1 && number(&copies[0], "count")? == frames, "{copies:?}");
    let bytes = frames * width * height * 4;
    for (what, expected) in [
        ("bytes_copied", bytes),
        ("frames/captured", frames),
        ("frames/presented", frames),
        ("verify/checked", frames),
        ("verify/wrong", 0),
    ] {
        ensure!(number(result, what)? == expected, "{what} is not {expected}: {result}");
    }
    Ok(())
}

fn yuyv_is_copied() -> anyhow::Result<Outcome> {
    let frames = 120;
    let options = format!("--format YUYV --size 640x360 --frames {frames} --verify");
    let result = finish(&mut pipe(&options))?.json(0)?;
    converted_once(&result, frames, (640, 360))?;
    for rung in ["exported", "reverse"] {
        let refusal = refusal(&result, rung)?;
        ensure!(text(refusal, "why")?.contains("YUYV") && text(refusal, "repair")?.contains("XR24"), "{refusal}");
    }
    refusal(&result, "converted")?;
    let run = finish(&mut pipe(&format!("{options} --path zero-copy")))?;
    run.one_line(3, &["zero copy", "exported", "YUYV", "XR24"])?;
    let result = run.json(3)?;
    ensure!(text(refusal(&result, "exported")?, "why")?.contains("YUYV"), "{result}");
    ensure!(result.get("frames").is_none(), "numbers that were not measured: {result}");
    PASSED
}

fn nv12_where_it_can() -> anyhow::Result<Outcome> {
    let result = finish(&mut pipe("--format NV12 --size 640x360 --frames 4 --verify"))?.json(0)?;
    if kernel() >= (7, 0) {
        ensure!(result["path"] == "exported" && number(&result, "bytes_copied")? == 0, "{result}");
        shown_of_captured(&result, 4, 4)?;
    } else {
        converted_once(&result, 4, (640, 360))?;
        ensure!(text(refusal(&result, "exported")?, "why")?.contains("NV12"), "{result}");
    }
    PASSED
}

/// The formats of vivid that a README's reader is told of: without a copy where vkms has them, converted where it has not.
fn every_format() -> anyhow::Result<Outcome> {
    const NOWHERE: [&str; 3] = ["YUYV", "UYVY", "GREY"];
    const SINCE_7: [&str; 15] = [
        "NV12", "NV21", "NV16", "NV61", "NV24", "NV42", "YU12", "YV12", "YU16", "AB24", "XB24", "BA24", "RA24", "RG24",
        "BG24",
    ];
    for code in NOWHERE.into_iter().chain(SINCE_7) {
        let run = finish(&mut pipe(&format!("--format {code} --size 320x180 --frames 2 --verify")))?;
        let result = run.json(0).with_context(|| code.to_owned())?;
        if kernel() >= (7, 0) && SINCE_7.contains(&code) {
            shown_of_captured(&result, 2, 2).with_context(|| code.to_owned())?;
            ensure!(number(&result, "bytes_copied")? == 0, "{code}: {result}");
        } else {
            converted_once(&result, 2, (320, 180)).with_context(|| code.to_owned())?;
        }
    }
    PASSED
}

fn strides() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    for parameters in [&["multiplanar=1"], &["multiplanar=2"]] {
        vivid(parameters)?;
        let options = "--format XR24 --size 640x360 --stride 2624 --stride-align 256 --frames 8 --verify";
        let result = finish(&mut pipe(options))?.json(0)?;
        ensure!(result["path"] == "reverse" && number(&result, "bytes_copied")? == 0, "{result}");
        ensure!(number(&result, "verify/checked")? == 8 && number(&result, "verify/wrong")? == 0, "{result}");
        ensure!(number(&result, "imports")? == number(&result, "buffers")?, "{result}");
        ensure!(result["stride"][0] == 2560, "the rows are of {} bytes", result["stride"]);
        ensure!(text(refusal(&result, "exported")?, "why")?.contains("2624"), "{result}");
    }
    crate::modules::reload()?;
    before.is_back()?;
    drop(witness);
    PASSED
}

fn contiguous() -> anyhow::Result<Outcome> {
    vivid(&["allocators=1"])?;
    let _shattered = Shattered::new()?;
    let options = "--format XR24 --size 640x360 --stride 2624 --stride-align 256 --frames 6 --verify";
    let result = finish(&mut pipe(options))?.json(0)?;
    ensure!(number(&result, "bytes_copied")? == 0 && number(&result, "verify/wrong")? == 0, "{result}");
    ensure!(result["stride"][0] == 2560, "{result}");
    let refusals = result["refusals"].as_array().context("refusals")?;
    let reverse: Vec<_> = refusals.iter().filter(|refusal| refusal["rung"] == "reverse").collect();
    for refusal in &reverse {
        ensure!(refusal["errno"] == "EFAULT" && refusal["step"] == "VIDIOC_PREPARE_BUF", "{refusal}");
        ensure!(text(refusal, "why")?.contains("contiguous"), "{refusal}");
        ensure!(text(refusal, "repair")?.contains("own buffers"), "{refusal}");
    }
    // The display's own memory, the heap's and udmabuf's were refused, unless the second or third happened to be contiguous. The cure
    // that is left then is the camera's own memory with other rows.
    let path = text(&result, "path")?;
    note(&format!("{path}, after {} refusals of others' memory", reverse.len()));
    ensure!(!reverse.is_empty(), "nobody's memory was refused: {result}");
    ensure!(path == if reverse.len() == MAKERS { "exported" } else { "reverse" }, "{result}");
    crate::modules::reload()?;
    PASSED
}

fn a_copy_on_demand() -> anyhow::Result<Outcome> {
    let result = finish(&mut pipe("--format XR24 --size 640x360 --frames 6 --verify --path copy"))?.json(0)?;
    converted_once(&result, 6, (640, 360))?;
    ensure!(
        result["copies"][0]["cause"]
            .as_str()
            .is_some_and(|cause| cause.contains("demanded")),
        "{result}"
    );
    PASSED
}

fn a_wrong_copy() -> anyhow::Result<Outcome> {
    let run = finish(&mut pipe("--format YUYV --size 320x180 --frames 5 --verify --corrupt-frame 3"))?;
    let result = run.json(4)?;
    ensure!(number(&result, "verify/first_wrong/frame")? == 3, "{result}");
    PASSED
}
