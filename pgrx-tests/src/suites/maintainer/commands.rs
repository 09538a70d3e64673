//! Commands that make a maintainer come, or must not be kept waiting by one.

use anyhow::{Result, ensure};

use super::*;

// If this fails, a queue is not maintained until the server is restarted, or a rolled-back extension is.
pub fn it_comes_with_the_commit_of_create_extension(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.cluster.connect("postgres")?;
    for name in OTHERS {
        client.batch_execute(&format!("CREATE DATABASE {name}"))?;
    }
    let [rolled_back, first, second, without] = OTHERS;
    let mut undone = stage.cluster.connect(rolled_back)?;
    undone.batch_execute("BEGIN; CREATE EXTENSION awa_queue; ROLLBACK")?;
    for name in [first, second] {
        stage.cluster.connect(name)?.batch_execute("CREATE EXTENSION awa_queue")?;
        wait_for_maintainer(&mut client, name)?;
    }
    for name in [rolled_back, without, "postgres"] {
        wait_for_pid(&mut client, name, |pid| pid.is_none(), "there is no extension")?;
    }
    // Each works for itself, from its first queue on.
    let mut clients = [stage.cluster.connect(first)?, stage.cluster.connect(second)?];
    for client in &mut clients {
        wait_for_finding(client, "maintainer", "ok", "no queue was created yet")?;
    }
    clients[0].batch_execute("SELECT awa.create_queue('q')")?;
    wait_until_it_works(&mut clients[0])?;
    wait_for_finding(&mut clients[1], "maintainer", "ok", "no queue was created yet")?;
    undone.batch_execute("CREATE EXTENSION awa_queue")?;
    wait_for_maintainer(&mut client, rolled_back)?;
    drop((undone, clients));
    end(stage)
}

// If this fails, DROP EXTENSION waits, leaves a process behind, or its successor is not maintained.
pub fn it_leaves_with_the_extension_and_comes_with_the_next(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let log_start = stage.cluster.log_size();
    for _ in 0..5 {
        client.batch_execute("SET lock_timeout = '20s'; DROP EXTENSION awa_queue CASCADE")?;
        wait_for_pid(&mut client, DATABASE, |pid| pid.is_none(), "the extension was dropped")?;
        client.batch_execute("CREATE EXTENSION awa_queue; SELECT awa.create_queue('q')")?;
        wait_until_it_works(&mut client)?;
        wait_for_steps(&mut client, "rotate", 2)?;
        // Without waiting for it to leave: the next one may be there before the old one has looked.
        client.batch_execute("DROP EXTENSION awa_queue CASCADE")?;
        client.batch_execute("CREATE EXTENSION awa_queue; SELECT awa.create_queue('q')")?;
        wait_until_it_works(&mut client)?;
    }
    let log = stage.cluster.log_since(log_start)?;
    let complaints: Vec<&str> = log.lines().filter(|line| line.contains("WARNING") || line.contains("FATAL")).collect();
    ensure!(complaints.is_empty(), "the log has {complaints:?}");
    end(stage)
}

// If this fails, a database with a queue cannot be dropped, renamed, moved or copied.
pub fn commands_that_need_an_empty_database_succeed(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let [one, two, three, _] = OTHERS;
    stage.cluster.create_database(one)?;
    stage.cluster.connect(one)?.batch_execute("SELECT awa.create_queue('q')")?;
    let mut client = stage.cluster.connect("postgres")?;
    client.batch_execute("DROP TABLESPACE IF EXISTS awa_space")?;
    client.batch_execute("SET allow_in_place_tablespaces = on")?;
    client.batch_execute("CREATE TABLESPACE awa_space LOCATION ''")?;
    for _ in 0..3 {
        wait_for_maintainer(&mut client, one)?;
        client.batch_execute(&format!("ALTER DATABASE {one} RENAME TO {two}"))?;
        wait_for_maintainer(&mut client, two)?;
        client.batch_execute(&format!("CREATE DATABASE {three} TEMPLATE {two}"))?;
        wait_for_maintainer(&mut client, two)?;
        wait_for_maintainer(&mut client, three)?;
        client.batch_execute(&format!("ALTER DATABASE {two} SET TABLESPACE awa_space"))?;
        wait_for_maintainer(&mut client, two)?;
        client.batch_execute(&format!("ALTER DATABASE {two} SET TABLESPACE pg_default"))?;
        client.batch_execute(&format!("DROP DATABASE {three}"))?;
        // Each before the maintainer has come back.
        client.batch_execute(&format!("ALTER DATABASE {two} RENAME TO {three}"))?;
        client.batch_execute(&format!("CREATE DATABASE {two} TEMPLATE {three}"))?;
        client.batch_execute(&format!("DROP DATABASE {two}"))?;
        client.batch_execute(&format!("ALTER DATABASE {three} RENAME TO {one}"))?;
    }
    wait_for_maintainer(&mut client, one)?;
    client.batch_execute(&format!("DROP DATABASE {one}"))?;
    client.batch_execute("DROP TABLESPACE awa_space")?;
    end(stage)
}

// If this fails, a command that failed, or that was not allowed, leaves a database without maintenance.
pub fn after_a_command_that_failed_it_comes_back(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.cluster.connect("postgres")?;
    let before = wait_for_maintainer(&mut client, DATABASE)?;
    client.batch_execute("DROP ROLE IF EXISTS awa_nobody; CREATE ROLE awa_nobody CREATEDB")?;
    for sql in ["DROP DATABASE awa_case", "ALTER DATABASE awa_case RENAME TO x", "CREATE DATABASE x TEMPLATE awa_case"] {
        client.batch_execute("SET ROLE awa_nobody")?;
        let refused = client.batch_execute(sql);
        client.batch_execute("RESET ROLE")?;
        ensure!(refused.is_err(), "not refused: {sql}");
    }
    ensure!(pid_of(&mut client, DATABASE)? == Some(before), "a role without rights has stopped the maintainer");
    client.batch_execute("DROP ROLE awa_nobody")?;
    // The owner's, in a transaction block or with a session in the way. The latter takes the server five seconds.
    let in_the_way = stage.connect()?;
    for sql in ["BEGIN; DROP DATABASE awa_case", "ALTER DATABASE awa_case RENAME TO awa_one"] {
        ensure!(client.batch_execute(sql).is_err(), "not refused: {sql}");
        client.batch_execute("ROLLBACK")?;
        wait_for_maintainer(&mut client, DATABASE)?;
    }
    drop(in_the_way);
    wait_until_it_works(&mut stage.connect()?)?;
    // A session that ends in the middle of its command keeps nothing.
    let holder = stage.connect()?;
    let mut dropper = stage.cluster.connect("postgres")?;
    let pid: i32 = dropper.query_one("SELECT pg_backend_pid()", &[])?.try_get(0)?;
    std::thread::scope(|scope| -> Result<()> {
        let command = scope.spawn(move || dropper.batch_execute("DROP DATABASE awa_case"));
        wait_for_pid(&mut client, DATABASE, |pid| pid.is_none(), "the command has begun")?;
        client.execute("SELECT pg_terminate_backend($1)", &[&pid])?;
        let ended = command.join().map_err(|_| anyhow::anyhow!("the dropping thread panicked"))?;
        ensure!(ended.is_err(), "the database was dropped");
        Ok(())
    })?;
    wait_for_maintainer(&mut client, DATABASE)?;
    drop(holder);
    wait_until_it_works(&mut stage.connect()?)?;
    end(stage)
}
