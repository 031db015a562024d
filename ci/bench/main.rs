//! `bench`: measures dmaflow beside GStreamer and beside the floor, inside the virtual machine; see `ci/bench/run`.
//!
//! It wants a guest whose clock counts instructions (`tools/vm/run --icount`): CPU time in nanoseconds is then a number
//! of instructions. It must be the only load there, and root.

mod budget;
mod handover;
mod measure;
mod programs;
mod report;
mod shown;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use handover::{HandOver, Way};
use programs::{Program, Size};

/// Frames of the long and the short run, for instructions and for system calls alike: the difference leaves the start
/// out.
const LONG: u32 = 660;
const SHORT: u32 = 60;
/// The long run of programs that are measured for their copies alone.
const COPIED: u32 = 180;
/// Those of a GPU that an emulated processor emulates: seconds for each frame.
const BY_GPU: (u32, u32) = (2, 6);
/// How many of each for instructions; the median counts. What a frame costs depends on when in the display's cycle it
/// comes (a program that finds it ready does not sleep), so a run is one of a few modes.
const LONG_RUNS: usize = 5;
const SHORT_RUNS: usize = 3;
/// Frames of the run that is traced to see what the display shows.
const TRACED: u32 = 240;

#[derive(Parser)]
struct Arguments {
    /// Where to write the results as JSON.
    #[arg(long, default_value = "target/vm/out/bench.json")]
    out: PathBuf,
    /// Measure these alone (by the names of the table, or `copies`, `gpu` or `handover`), and check no budgets but those of `copies` and
    /// `handover`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Measure these widths alone, and check no budget.
    #[arg(long, value_delimiter = ',')]
    widths: Vec<u32>,
}

/// One program at one size.
#[derive(Serialize, Clone, Debug)]
struct Row {
    program: Program,
    width: u32,
    height: u32,
    camera_fps: u32,
    /// Of the process, in user space and in the kernel.
    instructions_per_frame: f64,
    startup_instructions: f64,
    peak_resident_kib: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    shown_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_calls_per_frame: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    startup_system_calls: Option<f64>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let (handed, names): (Vec<_>, Vec<_>) = arguments.only.iter().cloned().partition(|name| name == Way::NAME);
    let complete = arguments.only.is_empty() && arguments.widths.is_empty();
    let mut handovers = Vec::new();
    if complete || !handed.is_empty() {
        report::progress("how a frame changes hands");
        handovers = Way::ALL.map(Way::measure).into_iter().collect::<Result<_>>()?;
    }
    let rows = if handed.is_empty() || !names.is_empty() { rows(&names, &arguments.widths)? } else { Vec::new() };
    let copies = complete || names.iter().any(|name| name == Program::COPIES);
    let mut checks = if complete { budget::check(&rows) } else { Vec::new() };
    if copies {
        checks.extend(budget::check_copies(&rows));
    }
    if !handovers.is_empty() {
        checks.extend(budget::check_handover(&handovers));
    }
    write_json(&arguments.out, &rows, &handovers, &checks)?;
    report::all(&rows, &handovers, &checks)?;
    Ok(if checks.iter().all(|check| check.met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Programs of these names (all, if there are none) at these widths.
fn rows(names: &[String], widths: &[u32]) -> Result<Vec<Row>> {
    // Its plug-in registry is made at the first start and is no part of what a user pays each time.
    measure::run(&programs::warm_up()).context("start GStreamer")?;
    let mut rows = Vec::new();
    // Those that copy beside one that is measured in full otherwise.
    let alone = Program::size_of(names);
    for size in Size::ALL {
        let mode = measure::mode_of(&Program::DmaflowFifo.command(size, None, 2));
        let mode = mode.as_deref();
        for program in Program::ALL {
            let wanted = names.is_empty() || names.iter().any(|name| program.is_called(name));
            let width = widths.is_empty() || widths.contains(&size.width);
            let here = program.measured_at(size) && alone.is_none_or(|alone| alone == size);
            if wanted && width && here {
                report::progress(&format!("{} {}x{}", program.name(), size.width, size.height));
                rows.push(
                    row(program, size, mode, alone.is_some() || program.is_dear())
                        .with_context(|| format!("{} at {size:?}", program.name()))?,
                );
            }
        }
    }
    Ok(rows)
}

fn row(program: Program, size: Size, mode: Option<&str>, quick: bool) -> Result<Row> {
    let command = |frames| program.command(size, mode, frames);
    // Copies cost so much that neither the modes of a run nor its length matter.
    let by_gpu = program == Program::DmaflowGpu;
    let ((short_frames, long_frames), runs) = match (by_gpu, quick) {
        (true, _) => (BY_GPU, 1),
        (false, true) => ((SHORT, COPIED), 1),
        (false, false) => ((SHORT, LONG), LONG_RUNS),
    };
    if by_gpu {
        // Mesa compiles the shader in a user's first run and keeps it on disk (its shader cache) for those after it.
        measure::run(&command(short_frames)).context("have the shader compiled")?;
    }
    let (short, short_peak) = median_cost(&command(short_frames), runs.min(SHORT_RUNS))?;
    let (long, long_peak) = median_cost(&command(long_frames), runs)?;
    let instructions = (long - short) / f64::from(long_frames - short_frames);
    let mut row = Row {
        program,
        width: size.width,
        height: size.height,
        camera_fps: size.rate,
        instructions_per_frame: instructions,
        startup_instructions: short - f64::from(short_frames) * instructions,
        peak_resident_kib: short_peak.max(long_peak),
        shown_per_second: None,
        system_calls_per_frame: None,
        startup_system_calls: None,
    };
    if size.rate == 60 && !by_gpu {
        row.shown_per_second = Some(shown::per_second(&command(TRACED))?);
    }
    // The calls do not depend on the size.
    if size == Size::ALL[0] && !quick {
        let calls = |frames| measure::system_calls(&command(frames), &[]);
        let (short, long) = (calls(SHORT)? as f64, calls(LONG)? as f64);
        let each = (long - short) / f64::from(LONG - SHORT);
        row.system_calls_per_frame = Some(each);
        row.startup_system_calls = Some(short - f64::from(SHORT) * each);
    }
    Ok(row)
}

/// The median of the instructions of some runs, and the most memory of all of them.
fn median_cost(command: &[String], runs: usize) -> Result<(f64, u64)> {
    let mut costs = Vec::new();
    let mut peak = 0;
    for run in 0..runs {
        // Each run starts elsewhere in the camera's and the display's cycle of 16.7 ms.
        std::thread::sleep(Duration::from_micros(3700 * run as u64));
        let usage = measure::run(command)?;
        costs.push(usage.cpu_ns);
        peak = peak.max(usage.peak_resident_kib);
    }
    costs.sort_unstable();
    Ok((costs.get(runs / 2).copied().unwrap_or_default() as f64, peak))
}

fn write_json(path: &Path, rows: &[Row], handovers: &[HandOver], checks: &[budget::Check]) -> Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let value = serde_json::json!({ "kernel": kernel.trim(), "rows": rows, "handover": handovers, "budgets": checks });
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_string_pretty(&value)? + "\n").with_context(|| path.display().to_string())
}
