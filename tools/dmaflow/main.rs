//! The command `dmaflow`: moves frames without copying them, and says what it did.

mod args;
mod bufs;
mod bufs_report;
mod ends;
mod failure;
#[cfg(feature = "gbm")]
mod hear;
mod keep;
mod list;
mod list_shares;
mod live;
mod output;
mod pipe;
mod probe;
mod probe_report;
mod report;
mod share;
mod snap;
mod stop;
mod table;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.command {
        Command::List(args) => list::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Pipe(args) => pipe::run(args),
        Command::Share(args) => share::run(args),
        Command::Snap(args) => snap::run(args),
        Command::Bufs(args) => bufs::run(args),
    };
    match result {
        Ok(status) => status,
        Err(error) => {
            let (status, line) = failure::explain(&error);
            output::complain(&format!("error: {line}"));
            status
        }
    }
}
