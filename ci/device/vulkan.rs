//! `--to vulkan` on lavapipe: every frame read through an imported image, and compared; the validation layer watches all of it.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::gpu::{is_tested, tested};
use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{as_nobody, vivid};
use crate::process::{State, dmaflow, finish, number, sh};

const NEEDS: &[&str] = &["vivid", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[
    Test { name: "vulkan::listed", needs: NEEDS, seconds: 120, run: listed },
    Test { name: "vulkan::every_frame_as_captured", needs: NEEDS, seconds: 600, run: every_frame_as_captured },
    Test { name: "vulkan::two_memory_planes", needs: NEEDS, seconds: 300, run: two_memory_planes },
    Test { name: "vulkan::a_changed_byte", needs: NEEDS, seconds: 300, run: a_changed_byte },
    Test { name: "vulkan::strange_rows", needs: NEEDS, seconds: 300, run: strange_rows },
    Test { name: "vulkan::what_it_does_not_take", needs: NEEDS, seconds: 300, run: what_it_does_not_take },
    Test { name: "vulkan::without_it", needs: NEEDS, seconds: 120, run: without_it },
    Test {
        name: "vulkan::system_calls",
        needs: &["vivid", "udmabuf", "vulkaninfo", "strace"],
        seconds: 300,
        run: system_calls,
    },
];

/// The smallest of vivid's webcam: a GPU that the emulated processor emulates takes a quarter of a second for a frame of it.
const SIZE: &str = "320x180";
/// A shape that so many frames of can be looked at: vivid's HDMI input, also 60 frames a second, is scaled to any size. Rows of
/// 144 pixels are no multiple of a workgroup's 64.
pub const MANY: &str = "--input 3 --size 144x72";

/// `pipe` from vivid to the GPU, checked by the validation layer: a message of its makes it fail.
pub fn pipe(arguments: &str) -> Command {
    let mut command = dmaflow(&format!("pipe --from vivid --to vulkan:{} --json {arguments}", tested()));
    command.env("DMAFLOW_VULKAN_VALIDATION", "1");
    command
}

/// The formats that the GPU lists.
fn formats() -> Result<Vec<Value>> {
    let list = finish(&mut dmaflow("list --json"))?.json(0)?;
    let gpu = list["gpus"].as_array().and_then(|all| all.iter().find(|gpu| is_tested(gpu)));
    let gpu = gpu.with_context(|| format!("not there: {list}"))?;
    Ok(gpu["formats"].as_array().context("formats")?.clone())
}

fn offer<'a>(formats: &'a [Value], name: &str) -> Option<&'a Value> {
    formats.iter().find(|offer| offer["format"] == name)
}

fn listed() -> anyhow::Result<Outcome> {
    let formats = formats()?;
    for name in ["XR24", "AR24", "NV12"] {
        let offer = offer(&formats, name).with_context(|| format!("{name} is not listed"))?;
        let modifiers = offer["modifiers"].as_array().context("modifiers")?;
        let linear = modifiers.iter().find(|one| one["modifier"] == "LINEAR").context("no LINEAR")?;
        ensure!(number(linear, "planes")? == if name == "NV12" { 2 } else { 1 }, "{name}: {linear}");
        let features = linear["features"].as_array().context("features")?;
        ensure!(features.iter().any(|feature| feature == "SAMPLED_IMAGE"), "{name}: {linear}");
    }
    let list = finish(&mut dmaflow("list --json"))?.json(0)?;
    let handles = list["gpus"][0]["memory_handles"].as_array().context("handles")?;
    ensure!(
        handles
            .iter()
            .any(|one| one["handle"] == "DMA_BUF" && one["importable"] == true),
        "{list}"
    );
    for what in ["semaphore", "fence"] {
        let ways = &list["gpus"][0]["sync_fd"][what];
        ensure!(ways["importable"].is_boolean() && ways["exportable"].is_boolean(), "{what}: {list}");
    }
    let table = finish(&mut dmaflow("list"))?;
    table.has_status(0)?;
    ensure!(table.stdout.contains("llvmpipe") && table.stdout.contains("DMA_BUF"), "{}", table.stdout);
    let names: Vec<_> = formats.iter().filter_map(|offer| offer["format"].as_str()).collect();
    note(&names.join(" "));
    PASSED
}

/// Read by the GPU from the camera's own buffers, each imported once, and every one right.
fn is_right(result: &Value, frames: u64) -> Result<()> {
    ensure!(result["path"] == "exported" && number(result, "bytes_copied")? == 0, "{result}");
    ensure!(number(result, "imports")? == number(result, "buffers")?, "{result}");
    ensure!(number(result, "verify/checked")? == frames && number(result, "verify/wrong")? == 0, "{result}");
    ensure!(number(result, "frames/presented")? == frames, "{result}");
    ensure!(is_tested(&result["gpu"]), "{result}");
    let checksums = result["gpu"]["checksums"].as_array().context("checksums")?;
    ensure!(checksums.len() as u64 == frames.min(256), "{result}");
    // vivid's pictures differ: it writes the time into each. Two may be of the same millisecond where it catches up.
    ensure!(checksums.iter().any(|one| one["checksum"] != checksums[0]["checksum"]), "{result}");
    Ok(())
}

fn every_frame_as_captured() -> anyhow::Result<Outcome> {
    let formats = formats()?;
    let before = State::read();
    let mut done = Vec::new();
    for name in ["XR24", "AR24", "NV12", "RG16", "YU12"] {
        if offer(&formats, name).is_none() {
            refused_with_a_reason(name, SIZE)?;
            continue;
        }
        let result = finish(&mut pipe(&format!("--format {name} {MANY} --frames 120 --verify")))?.json(0);
        let result = result.with_context(|| name.to_owned())?;
        is_right(&result, 120).with_context(|| name.to_owned())?;
        done.push(name);
        before.is_back()?;
    }
    for name in ["RGGB", "YV12", "NV16", "Y16 ", "XR15"] {
        let Some(listed) = offer(&formats, name.trim()).and(Some(name)) else { continue };
        let options = format!("--format {listed} {MANY} --frames 5 --verify");
        let result = finish(&mut pipe(&options))?.json(0).with_context(|| name.to_owned())?;
        is_right(&result, 5).with_context(|| name.to_owned())?;
        done.push(name);
    }
    ensure!(["XR24", "AR24", "NV12"].iter().all(|name| done.contains(name)), "{done:?}");
    note(&done.join(" "));
    PASSED
}

/// What the GPU does not list goes another way, and the result says why.
fn refused_with_a_reason(name: &str, size: &str) -> Result<()> {
    let run = finish(&mut pipe(&format!("--format {name} --size {size} --frames 3 --path zero-copy")))?;
    let result = run.json(3)?;
    let refusal = &result["refusals"][0];
    let has = |key: &str| refusal[key].as_str().is_some_and(|text| !text.is_empty());
    ensure!(refusal["rung"] == "exported" && has("step") && has("why") && has("repair"), "{name}: {result}");
    let result = finish(&mut pipe(&format!("--format {name} --size {size} --frames 3 --verify")))?.json(0)?;
    ensure!(result["path"] == "copied" && number(&result, "verify/wrong")? == 0, "{name}: {result}");
    Ok(())
}

/// NV12 in two dma-bufs: a disjoint image.
fn two_memory_planes() -> anyhow::Result<Outcome> {
    let formats = formats()?;
    vivid(&["multiplanar=2"])?;
    for (format, planes) in [("NV12", 1), ("NM12", 2), ("YM12", 3)] {
        let name = if format == "YM12" { "YU12" } else { "NV12" };
        let several = offer(&formats, name)
            .and_then(|offer| offer["modifiers"].as_array()?.first())
            .is_some_and(|modifier| modifier["several_dma_bufs"] == true);
        // Of one memory plane there are as many above.
        let frames = if planes == 1 { 5 } else { 120 };
        let options = format!("--format {format} {MANY} --frames {frames} --verify");
        let result = finish(&mut pipe(&options))?.json(0).with_context(|| format.to_owned())?;
        if planes == 1 || several {
            is_right(&result, frames).with_context(|| format.to_owned())?;
            ensure!(number(&result, "memory_planes")? == planes, "{format}: {result}");
        } else {
            // Another way, and nothing wrong with it.
            let why = result["refusals"][0]["why"].as_str().context("a reason")?;
            ensure!(why.contains("several dma-bufs") || offer(&formats, name).is_none(), "{format}: {result}");
            ensure!(number(&result, "verify/wrong")? == 0, "{format}: {result}");
        }
        note(&format!("{format}: {}", result["path"]));
    }
    PASSED
}

fn a_changed_byte() -> anyhow::Result<Outcome> {
    for (format, place) in [("XR24", 7), ("NV12", 0), ("AR24", 11)] {
        let options = format!("--format {format} --size 320x180 --frames 12 --verify --corrupt-frame {place}");
        let run = finish(&mut pipe(&options))?;
        let result = run.json(4).with_context(|| format.to_owned())?;
        ensure!(number(&result, "verify/checked")? == 12 && number(&result, "verify/wrong")? == 1, "{result}");
        ensure!(number(&result, "verify/first_wrong/frame")? == place, "{result}");
    }
    PASSED
}

/// Rows longer than the pixels, and sizes that are no multiple of a workgroup.
fn strange_rows() -> anyhow::Result<Outcome> {
    for options in [
        "--from vivid --format XR24 --size 320x180 --stride 1536",
        "--from vivid --format NV12 --size 320x180 --stride 512",
        "--from pattern --format XR24 --size 66x51",
        "--from pattern --format NV12 --size 322x182",
        "--from pattern --format YU12 --size 66x50",
    ] {
        let mut command = dmaflow(&format!("pipe --to vulkan --json {options} --frames 5 --verify"));
        let result = finish(command.env("DMAFLOW_VULKAN_VALIDATION", "1"))?.json(0);
        let result = result.with_context(|| options.to_owned())?;
        ensure!(result["path"] == "exported" && number(&result, "bytes_copied")? == 0, "{result}");
        ensure!(number(&result, "verify/checked")? == 5 && number(&result, "verify/wrong")? == 0, "{result}");
    }
    PASSED
}

fn what_it_does_not_take() -> anyhow::Result<Outcome> {
    refused_with_a_reason("YUYV", SIZE)?;
    // The copy that was demanded is read by the GPU as well.
    let result = finish(&mut pipe("--format XR24 --size 320x180 --frames 5 --path copy --verify"))?.json(0)?;
    ensure!(result["path"] == "copied" && number(&result, "verify/checked")? == 5, "{result}");
    ensure!(number(&result, "verify/wrong")? == 0, "{result}");
    for (to, status) in [("vulkan:nosuch", 1), ("vulkan:", 2), ("vulkan:/dev/dri/nosuch", 1)] {
        let run = finish(&mut dmaflow(&format!("pipe --from vivid --to {to} --frames 1 --json")))?;
        run.has_status(status)?;
        ensure!(run.stdout.is_empty(), "{to}: {}", run.stdout);
    }
    let run = finish(&mut dmaflow("pipe --from vivid --to vulkan:nosuch --frames 1"))?;
    run.one_line(1, &["nosuch", "llvmpipe"])?;
    finish(&mut dmaflow("pipe --from vivid --to vulkan:LLVM --frames 1"))?.has_status(0)?;
    PASSED
}

/// No loader, no driver, no dma-bufs in it: explained, and `list` goes on without.
fn without_it() -> anyhow::Result<Outcome> {
    let hidden = format!("/tmp/hidden.{}", std::process::id());
    sh(&format!("mkdir -p {hidden} && : >{hidden}/libvulkan.so.1"))?;
    let no_loader = ("LD_LIBRARY_PATH", hidden.as_str(), "libvulkan.so.1");
    let no_driver = ("VK_DRIVER_FILES", "/nonexistent.json", "driver");
    for (variable, value, word) in [no_loader, no_driver] {
        let run = finish(dmaflow("pipe --from vivid --to vulkan --frames 1").env(variable, value))?;
        run.one_line(1, &[word, "install"])?;
        let list = finish(dmaflow("list --json").env(variable, value))?.json(0)?;
        ensure!(list["gpus"].as_array().is_some_and(Vec::is_empty), "{list}");
        ensure!(list["refused"].to_string().contains(word), "{list}");
    }
    fs::remove_dir_all(&hidden)?;
    // Without /dev/udmabuf Mesa's software driver has no dma-bufs.
    let program = dmaflow("").get_program().to_string_lossy().into_owned();
    let run = finish(&mut as_nobody(&format!("{program} pipe --from pattern --to vulkan --frames 1")))?;
    run.one_line(1, &["VK_EXT_image_drm_format_modifier", "/dev/udmabuf"])?;
    PASSED
}

/// No descriptor, no mapping and no import a frame: two ioctls (DQBUF, QBUF), the wait for the camera, and the driver's own threads.
fn system_calls() -> anyhow::Result<Outcome> {
    const SHORT: u64 = 20;
    const LONG: u64 = 120;
    let count = |frames: u64| -> Result<Vec<(String, u64)>> {
        let table = format!("/tmp/strace.{}", std::process::id());
        let inner =
            dmaflow(&format!("pipe --from vivid --to vulkan --json --format XR24 --size 320x180 --frames {frames}"));
        let mut command = Command::new("strace");
        command
            .args(["-f", "-c", "-o", &table])
            .arg(inner.get_program())
            .args(inner.get_args());
        let result = finish(&mut command)?.json(0)?;
        ensure!(result["path"] == "exported" && number(&result, "frames/captured")? == frames, "{result}");
        let text = fs::read_to_string(&table)?;
        fs::remove_file(&table)?;
        let row = |line: &str| {
            let fields: Vec<_> = line.split_whitespace().collect();
            Some(((*fields.last()?).to_owned(), fields.get(3)?.parse().ok()?))
        };
        Ok(text.lines().filter_map(row).collect())
    };
    let (short, long) = (count(SHORT)?, count(LONG)?);
    let of = |table: &[(String, u64)], call: &str| {
        table.iter().find(|(name, _)| name == call).map_or(0, |(_, count)| *count)
    };
    let more = |call: &str| of(&long, call).saturating_sub(of(&short, call));
    let frames = LONG - SHORT;
    note(&format!("{} ioctls and {} futexes more for {frames} frames", more("ioctl"), more("futex")));
    ensure!(more("ioctl") >= 2 * frames, "strace saw nothing: {long:?}");
    ensure!(more("ioctl") <= 2 * frames + frames / 10, "{} ioctls for {frames} frames", more("ioctl"));
    for call in [
        "dup",
        "dup2",
        "dup3",
        "fcntl",
        "openat",
        "close",
        "mmap",
        "munmap",
        "brk",
        "mprotect",
        "madvise",
        "memfd_create",
        "read",
    ] {
        ensure!(more(call) <= frames / 20, "{} {call} for {frames} frames: {long:?}", more(call));
    }
    PASSED
}
