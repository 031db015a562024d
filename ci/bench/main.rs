//! `bench`: measures dmaflow beside GStreamer and beside the floor, inside the virtual machine; see `ci/bench/run`.
//!
//! It wants a guest whose clock counts instructions (`tools/vm/run --icount`): CPU time in nanoseconds is then a number
//! of instructions. It must be the only load there, and root.

mod budget;
mod measure;
mod programs;
mod report;
mod shown;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use programs::{Program, Size};

/// Frames of the long and the short run, for instructions and for system calls: the difference leaves the start out.
const CPU_RUNS: (u32, u32) = (1200, 60);
const CALL_RUNS: (u32, u32) = (660, 60);
/// Frames of the run that is traced to see what the display shows.
const TRACED: u32 = 240;

#[derive(Parser)]
struct Arguments {
    /// Where to write the results as JSON.
    #[arg(long, default_value = "target/vm/out/bench.json")]
    out: PathBuf,
    /// Measure these alone (by the names of the table), and check no budget.
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
    // Its plug-in registry is made at the first start and is no part of what a user pays each time.
    measure::run(&programs::warm_up()).context("start GStreamer")?;
    let mut rows = Vec::new();
    for size in Size::ALL {
        for program in Program::ALL {
            let wanted = arguments.only.is_empty() || arguments.only.iter().any(|name| name == program.name());
            let width = arguments.widths.is_empty() || arguments.widths.contains(&size.width);
            if wanted && width && program.measured_at(size) {
                report::progress(&format!("{} {}x{}", program.name(), size.width, size.height));
                rows.push(row(program, size).with_context(|| format!("{} at {size:?}", program.name()))?);
            }
        }
    }
    let complete = arguments.only.is_empty() && arguments.widths.is_empty();
    let checks = if complete { budget::check(&rows) } else { Vec::new() };
    write_json(&arguments.out, &rows, &checks)?;
    report::table(&rows, &checks)?;
    Ok(if checks.iter().all(|check| check.met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn row(program: Program, size: Size) -> Result<Row> {
    let (long, short) = CPU_RUNS;
    let run = |frames| measure::run(&program.command(size, frames));
    let (few, many) = (run(short)?, run(long)?);
    let instructions = (many.cpu_ns as f64 - few.cpu_ns as f64) / f64::from(long - short);
    let mut row = Row {
        program,
        width: size.width,
        height: size.height,
        camera_fps: size.rate,
        instructions_per_frame: instructions,
        startup_instructions: few.cpu_ns as f64 - f64::from(short) * instructions,
        peak_resident_kib: many.peak_resident_kib.max(few.peak_resident_kib),
        shown_per_second: None,
        system_calls_per_frame: None,
        startup_system_calls: None,
    };
    if size.rate == 60 {
        row.shown_per_second = Some(shown::per_second(&program.command(size, TRACED))?);
    }
    // The calls do not depend on the size.
    if size == Size::ALL[0] {
        let (long, short) = CALL_RUNS;
        let calls = |frames| measure::system_calls(&program.command(size, frames));
        let (few, many) = (calls(short)? as f64, calls(long)? as f64);
        let each = (many - few) / f64::from(long - short);
        row.system_calls_per_frame = Some(each);
        row.startup_system_calls = Some(few - f64::from(short) * each);
    }
    Ok(row)
}

fn write_json(path: &Path, rows: &[Row], checks: &[budget::Check]) -> Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let value = serde_json::json!({ "kernel": kernel.trim(), "rows": rows, "budgets": checks });
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_string_pretty(&value)? + "\n").with_context(|| path.display().to_string())
}
