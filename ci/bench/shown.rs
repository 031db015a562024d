//! How many frames a second the display shows, whoever drives it.
//!
//! A commit is not a picture: two commits between two vertical blanks show one. So the kernel is asked: a probe on
//! `drm_atomic_set_fb_for_plane`, through which every way to a new picture goes (atomic, page flip, set plane), one on
//! vkms's update of a plane, which ends each of those ways, and the tracepoint of the vertical blank. A frame is
//! counted at a vertical blank if the plane has another framebuffer than at the one before. Each buffer of the camera
//! is one framebuffer and no camera fills the same buffer twice in a row, so that is another frame.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::measure;

const TRACING: &str = "/sys/kernel/tracing";
const PROBES: &str = "p:bench/choose drm_atomic_set_fb_for_plane fb=%si:x64\np:bench/update vkms_plane_atomic_update\n";
const EVENTS: [&str; 3] = ["bench/choose", "bench/update", "drm/drm_vblank_event"];

/// The first frames are left out: programs start unevenly.
const SKIP: usize = 30;

/// Runs a program that shows frames, and counts.
pub fn per_second(command: &[String]) -> Result<f64> {
    let result = traced(command);
    // Whatever happened, what is measured next must not pay for probes.
    let off = stop();
    let trace = result?;
    off?;
    let shown = shown(&trace);
    let steady = shown.get(SKIP..).unwrap_or_default();
    match (steady.first(), steady.last()) {
        (Some(first), Some(last)) if last > first => Ok((steady.len() - 1) as f64 / (last - first)),
        _ => bail!("{} showed {} frames", command.join(" "), shown.len()),
    }
}

fn traced(command: &[String]) -> Result<String> {
    write("kprobe_events", PROBES)?;
    write("buffer_size_kb", "8192")?;
    write("trace_clock", "mono")?;
    write("trace", "")?;
    for event in EVENTS {
        write(&format!("events/{event}/enable"), "1")?;
    }
    write("tracing_on", "1")?;
    measure::run(command)?;
    write("tracing_on", "0")?;
    fs::read_to_string(Path::new(TRACING).join("trace")).context("read the trace")
}

fn stop() -> Result<()> {
    for event in EVENTS {
        let file = format!("events/{event}/enable");
        if Path::new(TRACING).join(&file).exists() {
            write(&file, "0")?;
        }
    }
    write("kprobe_events", "")
}

fn write(file: &str, text: &str) -> Result<()> {
    fs::write(Path::new(TRACING).join(file), text).with_context(|| format!("{TRACING}/{file}"))
}

/// The times, in seconds, of the vertical blanks at which another framebuffer came on show.
fn shown(trace: &str) -> Vec<f64> {
    let (mut chosen, mut updated, mut on_show) = ("", "", "");
    let mut times = Vec::new();
    let mut seen: HashMap<&str, u32> = HashMap::new();
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        // "program-123  [000] d..1.  12.345678: choose: (function+0x0/0x10) fb=0xffff8880"
        let Some((head, event)) = line.split_once(": ") else { continue };
        let Some(time) = head.rsplit(' ').next().and_then(|time| time.parse::<f64>().ok()) else { continue };
        if event.starts_with("choose:") {
            chosen = event.split_once("fb=").map_or("", |(_, fb)| fb.trim());
        } else if event.starts_with("update:") {
            updated = chosen;
        } else if event.starts_with("drm_vblank_event:") && updated != on_show {
            on_show = updated;
            times.push((time, on_show));
            *seen.entry(on_show).or_default() += 1;
        }
    }
    // What the console or the system had on show before and after comes once or twice, the camera's buffers in turn.
    times
        .into_iter()
        .filter(|(_, fb)| seen.get(fb).is_some_and(|&count| count > 4))
        .map(|(time, _)| time)
        .collect()
}
