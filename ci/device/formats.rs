//! Every format at every size, from every sort of vivid's memory, with strides of our own: shown to the bit.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::{Outcome, PASSED, Test, long, note};
use crate::modules::{StockVkms, kernel, vivid};
use crate::process::{dmaflow, finish, number, pipe};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "formats::sixty_frames", needs: NEEDS, seconds: 400, run: sixty_frames },
    Test { name: "formats::single_planar", needs: NEEDS, seconds: 1200, run: single_planar },
    Test { name: "formats::multi_planar", needs: NEEDS, seconds: 1200, run: multi_planar },
    Test { name: "formats::dma_contig", needs: NEEDS, seconds: 1200, run: dma_contig },
    Test { name: "formats::strides", needs: NEEDS, seconds: 600, run: strides },
    Test { name: "formats::yuv_single_planar", needs: NEEDS, seconds: 1500, run: yuv_single_planar },
    Test { name: "formats::yuv_multi_planar", needs: NEEDS, seconds: 1500, run: yuv_multi_planar },
    Test { name: "formats::yuv_strides", needs: NEEDS, seconds: 600, run: yuv_strides },
    Test { name: "formats::two_memory_planes", needs: NEEDS, seconds: 600, run: two_memory_planes },
    Test { name: "formats::stock_vkms", needs: NEEDS, seconds: 120, run: stock_vkms },
    Test { name: "formats::no_plane_takes_it", needs: NEEDS, seconds: 60, run: no_plane_takes_it },
];

const SIZES: [(u32, u32); 3] = [(640, 360), (1280, 720), (1920, 1080)];

/// One run, and what its result must say.
struct Case {
    format: &'static str,
    size: (u32, u32),
    stride: Option<u32>,
    frames: u64,
}

impl Case {
    fn of(format: &'static str, size: (u32, u32)) -> Case {
        // vkms composes in software: an emulated processor takes from 0.1 s a frame (XR24, 640x360) to 2 s (NV12, 1920x1080).
        let frames = match (format, size.0) {
            _ if long() => 600,
            ("XR24" | "AR24" | "RG16", 640) => 12,
            ("XR24" | "AR24" | "RG16", _) => 4,
            (_, 640) => 6,
            _ => 2,
        };
        Case { format, size, stride: None, frames }
    }

    /// Without CMA the kernel has no contiguous memory of more than 4 MiB (`MAX_PAGE_ORDER` 10).
    fn can_be_contiguous(&self) -> bool {
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let cma = memory
            .lines()
            .any(|line| line.starts_with("CmaTotal:") && !line.contains(" 0 kB"));
        let bytes = if self.format == "RG16" { 2 } else { 4 };
        cma || self.size.0 * self.size.1 * bytes <= 4 << 20
    }

    fn check(&self) -> Result<()> {
        let Case { format, size: (width, height), stride, frames } = self;
        let stride_option = stride.map_or(String::new(), |stride| format!("--stride {stride}"));
        let options = format!(
            "--format {format} --size {width}x{height} {stride_option} --frames {frames} --present fifo --verify"
        );
        let run = finish(&mut pipe(&options))?;
        let result = run.json(0)?;
        shown_without_a_copy(&result, *frames)?;
        ensure!(result["format"] == *format, "the format is {}", result["format"]);
        ensure!(
            number(&result, "width")? == u64::from(*width) && number(&result, "height")? == u64::from(*height),
            "{result}"
        );
        if let Some(stride) = stride {
            ensure!(result["stride"][0] == *stride, "stride {} instead of {stride}", result["stride"]);
        }
        ensure!(run.stderr.is_empty(), "stderr: {}", run.stderr);
        Ok(())
    }
}

/// What must hold of every good pipe from a camera to a display.
pub fn shown_without_a_copy(result: &Value, frames: u64) -> Result<()> {
    shown_of_captured(result, frames, frames)
}

/// The same where some of those captured are replaced by newer ones.
pub fn shown_of_captured(result: &Value, frames: u64, captured: u64) -> Result<()> {
    ensure!(result["path"] == "exported", "the path is {}", result["path"]);
    let numbers = [
        ("bytes_copied", 0),
        ("frames/captured", captured),
        ("frames/presented", frames),
        ("verify/checked", frames),
        ("verify/wrong", 0),
    ];
    for (path, expected) in numbers {
        let found = number(result, path)?;
        ensure!(found == expected, "{path} is {found} instead of {expected}: {result}");
    }
    let (imports, buffers) = (number(result, "imports")?, number(result, "buffers")?);
    ensure!(imports == buffers && buffers > 0, "{imports} imports of {buffers} buffers");
    ensure!(result["refusals"] == Value::Array(vec![]), "refusals: {}", result["refusals"]);
    Ok(())
}

/// Runs every case and names all that are wrong, not the first alone.
fn all(cases: &[Case]) -> anyhow::Result<Outcome> {
    ensure!(!cases.is_empty(), "no case at all");
    let mut wrong = String::new();
    for case in cases {
        if let Err(error) = case.check() {
            let (width, height) = case.size;
            let _ = writeln!(wrong, "{} {width}x{height} stride {:?}: {error:#}", case.format, case.stride);
        }
    }
    ensure!(wrong.is_empty(), "of {} cases:\n{wrong}", cases.len());
    note(&format!("{} cases", cases.len()));
    PASSED
}

fn rgb() -> Vec<Case> {
    SIZES
        .into_iter()
        .flat_map(|size| ["XR24", "AR24", "RG16"].map(|format| Case::of(format, size)))
        .collect()
}

/// The formats that vkms has since 7.x; what it says itself decides, but it may not lack them there.
fn yuv() -> Result<Option<[&'static str; 4]>> {
    let formats = ["NV12", "NV21", "YU12", "YV12"];
    let list = finish(&mut dmaflow("list --json"))?.json(0)?;
    let displays = list["displays"].as_array().cloned().unwrap_or_default();
    let vkms = displays.iter().find(|display| display["driver"] == "vkms");
    let offered = vkms
        .and_then(|display| display["formats"].as_array().cloned())
        .unwrap_or_default();
    ensure!(!offered.is_empty(), "vkms lists no formats");
    let takes = |format: &&str| offered.iter().any(|offer| offer == *format);
    let all = formats.iter().all(&takes);
    ensure!(all || kernel() < (7, 0), "vkms of this kernel has all of {formats:?}, but the list says {offered:?}");
    ensure!(all || !formats.iter().any(takes), "some of {formats:?} and not others: {offered:?}");
    Ok(all.then_some(formats))
}

fn no_yuv() -> anyhow::Result<Outcome> {
    Ok(Outcome::Skipped("vkms of this kernel scans out no YUV".to_owned()))
}

/// By default each format at the smallest size, and one of each sort at the others: a large picture takes vkms many seconds.
fn yuv_cases(formats: &[&'static str]) -> Vec<Case> {
    let cases = formats.iter().flat_map(|format| SIZES.map(|size| Case::of(format, size)));
    let chosen = |case: &Case| match case.size.0 {
        _ if long() => true,
        640 => true,
        1280 => matches!(case.format, "NV21" | "YU12"),
        _ => case.format == "NV12",
    };
    cases.filter(chosen).collect()
}

/// The plainest case at length.
fn sixty_frames() -> anyhow::Result<Outcome> {
    let frames = if long() { 600 } else { 60 };
    all(&[Case { frames, ..Case::of("XR24", (640, 360)) }])
}

fn single_planar() -> anyhow::Result<Outcome> {
    all(&rgb())
}

fn multi_planar() -> anyhow::Result<Outcome> {
    vivid(&["multiplanar=2"])?;
    all(&fewer(rgb()))
}

fn dma_contig() -> anyhow::Result<Outcome> {
    vivid(&["allocators=1"])?;
    let (possible, too_large): (Vec<_>, Vec<_>) = fewer(rgb()).into_iter().partition(Case::can_be_contiguous);
    for case in too_large {
        let (width, height) = case.size;
        let run = finish(&mut pipe(&format!("--format {} --size {width}x{height} --frames 1", case.format)))?;
        note(run.one_line(1, &["allocate buffers", "/dev/video0", "Cannot allocate memory", "CMA"])?);
    }
    all(&possible)
}

/// Where the memory is the only thing that differs, a few frames show it.
fn fewer(mut cases: Vec<Case>) -> Vec<Case> {
    if !long() {
        cases
            .iter_mut()
            .for_each(|case| case.frames = case.frames.min(if case.size.0 == 640 { 5 } else { 2 }));
    }
    cases
}

/// One stride just above the natural one (64 bytes: every format's pixels divide it) and one far from it.
fn strides() -> anyhow::Result<Outcome> {
    let mut cases = Vec::new();
    for (format, bytes) in [("XR24", 4), ("AR24", 4), ("RG16", 2)] {
        for size in SIZES {
            let natural = size.0 * bytes;
            for stride in [natural + 64, natural + 1000 * bytes] {
                let case = Case::of(format, size);
                let frames = if long() { case.frames } else { case.frames.min(2) };
                cases.push(Case { stride: Some(stride), frames, ..case });
            }
        }
    }
    all(&cases)?;
    vivid(&["multiplanar=2"])?;
    cases.retain(|case| case.size.0 == 640);
    all(&cases)
}

fn yuv_single_planar() -> anyhow::Result<Outcome> {
    let Some(formats) = yuv()? else { return no_yuv() };
    all(&yuv_cases(&formats))
}

fn yuv_multi_planar() -> anyhow::Result<Outcome> {
    let Some(formats) = yuv()? else { return no_yuv() };
    vivid(&["multiplanar=2"])?;
    let mut cases = yuv_cases(&formats);
    if !long() {
        cases.retain(|case| case.size.0 == 640);
        cases.iter_mut().for_each(|case| case.frames = 2);
    }
    all(&cases)
}

fn yuv_strides() -> anyhow::Result<Outcome> {
    let Some(formats) = yuv()? else { return no_yuv() };
    let mut cases = Vec::new();
    for format in formats {
        for stride in [640 + 64, 640 + 1000] {
            cases.push(Case {
                stride: Some(stride),
                frames: if long() { 600 } else { 2 },
                ..Case::of(format, (640, 360))
            });
        }
    }
    all(&cases)
}

/// Several memory planes, each a dma-buf of its own: vkms as the machine has it reads each of them, and shows them to the bit.
fn two_memory_planes() -> anyhow::Result<Outcome> {
    if yuv()?.is_none() {
        return no_yuv();
    }
    vivid(&["multiplanar=2"])?;
    for (format, planes) in [("NM12", 2), ("NM21", 2), ("YM12", 3), ("YM21", 3), ("NM16", 2)] {
        let frames = if long() { 600 } else { 3 };
        let run = finish(&mut pipe(&format!("--format {format} --size 640x360 --frames {frames} --verify")))?;
        let result = run.json(0).with_context(|| format.to_owned())?;
        shown_without_a_copy(&result, frames).with_context(|| format.to_owned())?;
        ensure!(number(&result, "memory_planes")? == planes, "{result}");
    }
    PASSED
}

/// vkms as it is up to 7.2 takes every colour plane from the first memory plane, so that the picture would be wrong: refused.
fn stock_vkms() -> anyhow::Result<Outcome> {
    if yuv()?.is_none() {
        return no_yuv();
    }
    let stock = StockVkms::load()?;
    vivid(&["multiplanar=2"])?;
    for format in ["NM12", "YM12"] {
        refused(&format!("--format {format} --size 640x360 --frames 2"), "memory plane")?;
    }
    // And with an offset before the first plane (`data_offset`), which it adds twice.
    refused("--format NM16 --size 640x360 --frames 2", "memory plane")?;
    // The camera itself is right: another sink takes these frames.
    let run = finish(&mut dmaflow("pipe --from vivid --to null --format NM12 --frames 3 --json"))?;
    let result = run.json(0)?;
    ensure!(number(&result, "memory_planes")? == 2 && number(&result, "frames/presented")? == 3, "{result}");
    stock.unload()?;
    PASSED
}

/// Without a copy it is refused: status 3, and one line that says why. Left alone, frames are copied, and shown right; the result says
/// why they were.
fn refused(options: &str, why: &str) -> anyhow::Result<Outcome> {
    for (path, status) in [("auto", 0), ("zero-copy", 3)] {
        let run = finish(&mut pipe(&format!("{options} --path {path} --verify")))?;
        let result = run.json(status)?;
        let refusal = &result["refusals"][0];
        ensure!(refusal["rung"] == "exported", "{result}");
        for key in ["step", "why", "repair"] {
            ensure!(refusal[key].as_str().is_some_and(|text| !text.is_empty()), "no {key} in {refusal}");
        }
        ensure!(refusal["why"].as_str().is_some_and(|text| text.contains(why)), "{refusal}");
        if path == "zero-copy" {
            run.one_line(status, &["refused", why])?;
            ensure!(result.get("frames").is_none(), "numbers that were not measured: {result}");
        } else {
            ensure!(result["path"] == "copied" && number(&result, "verify/wrong")? == 0, "{result}");
        }
    }
    PASSED
}

fn no_plane_takes_it() -> anyhow::Result<Outcome> {
    refused("--format YUYV --size 640x360 --frames 2", "YUYV")?;
    // Left alone, both ends agree on a format that both have, although the camera stands at YUYV.
    let result = finish(&mut pipe("--frames 2 --path zero-copy"))?.json(0)?;
    ensure!(result["path"] == "exported" && result["format"] != "YUYV", "{result}");
    PASSED
}
